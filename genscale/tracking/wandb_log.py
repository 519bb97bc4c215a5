"""The file in which W&B keeps a run that it has not uploaded: LevelDB's log format, with protobuf records in it.

After seven bytes of header come blocks of 32 KiB. A chunk is CRC-32 (of its kind and content), length and kind, 7 bytes in all,
then content; a record is one full chunk, or a first, some in the middle and a last one; what is left of a block that has no
room for a chunk's head stays zero.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7
HEAD = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
IDENTITY = b":W&B\xe1\xbe\x00"
"""The header of version 0, the only one there has been."""


class OtherFormat(Exception):
    """The file is not a W&B log of a version that is known."""


def read_records(path: Path) -> Iterator[bytes]:
    """The records up to the end, or to where a kill or a full disk has cut the file short.

    Raises:
        OtherFormat: another version, or another file.
        OSError: it cannot be read.
    """
    position, parts = HEADER, []
    with path.open("rb") as file:  # mapped, for it may be larger than it looks, or than memory
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    if data[:HEADER] != IDENTITY[: len(data)]:
        raise OtherFormat(f"{path} does not begin as W&B's logs do")
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = HEAD.unpack_from(data, position)
        content = data[position + HEADER : position + HEADER + length]
        if len(content) < length or zlib.crc32(content, zlib.crc32(bytes([kind]))) != checksum:
            return
        parts.append(content)
        position += HEADER + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """A file that `read_records` and W&B read."""
    with path.open("wb") as file:
        position = file.write(IDENTITY)
        for record in records:
            start = 0
            while True:
                room = BLOCK - position % BLOCK
                if room < HEADER:
                    position += file.write(bytes(room))
                    continue
                content = record[start : start + room - HEADER]
                first, last = start == 0, start + len(content) == len(record)
                kind = FULL if first and last else FIRST if first else LAST if last else MIDDLE
                checksum = zlib.crc32(content, zlib.crc32(bytes([kind])))
                position += file.write(HEAD.pack(checksum, len(content), kind) + content)
                start += len(content)
                if last:
                    break
