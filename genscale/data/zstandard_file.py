"""Zstandard files that say when they were cut off, which the library's own reader takes for their end."""

from __future__ import annotations

import io
from typing import Any, BinaryIO

import zstandard

CHUNK = 2**14
"""Compressed bytes at a time: what they become is held in memory."""


class ZstandardFile(io.RawIOBase):
    """The content of one frame after another, as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._compressed, self._content = b"", io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError where the file ends within a frame."""
        while not (count := self._content.readinto(buffer)):
            compressed = self._compressed or self._file.read(CHUNK)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a Zstandard frame: it was cut off")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content, self._compressed = io.BytesIO(self._frame.decompress(compressed)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        return count
