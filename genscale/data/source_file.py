"""A file of a source, local or at a URL, as it was found when the run started; it is decompressed while it is read."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import logging
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from genscale.data.web import AGAIN, WebAddress
from genscale.errors import UserError

log = logging.getLogger("genscale")
SKIPPED = 2**20
"""Bytes stepped over at a time."""
GROWTH = 200
"""How many times its size a compressed file may grow to. Text grows to a tenth of that, a file made to do harm to far more."""
SAMPLE = 2**12
"""Bytes of a file's beginning, middle and end that tell it from another of the same size and time."""
_warned: set[str] = set()


class TooLarge(Exception):
    """Something that is held in memory as a whole, or a file that grows when decompressed, is larger than allowed."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(f"{what} more than {most >> 20} MiB")


def is_url(name: str) -> bool:
    """Whether a source is read over HTTP."""
    return name.startswith(("http://", "https://"))


def url_path(url: str) -> str:
    """The path in a URL, without what asks for it (`?token=...`)."""
    return unquote(urlsplit(url).path)


def _zstandard(file: BinaryIO) -> io.BufferedIOBase:
    import pyarrow as pa

    # zstandard's own reader takes the place where a file was cut off for its end.
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), 2**17)


class _Bounded:
    """A stream of bytes that ends in an error where there are more than `most` of them."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream, self._most, self._left = stream, most, most

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._stream.read(size))

    def readline(self, size: int = -1) -> bytes:
        return self._counted(self._stream.readline(size))

    def _counted(self, part: bytes) -> bytes:
        self._left -= len(part)
        if self._left < 0:
            raise TooLarge(f"it decompresses to over {GROWTH} times its size,", self._most)
        return part


DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open,
                                                  ".zst": _zstandard}


@dataclass(frozen=True)
class SourceFile:
    """Where a file is and what it was at the start. Holds nothing open, so that it travels to worker processes.

    Attributes:
        path: of a local file, or a URL.
        where: the setting that names the source, as `key=value`, for messages.
        size: bytes; 0 where a server does not say.
        version: when a local file was last written, in nanoseconds; of a URL see `version_of`.
        ranges: whether a server gives parts of the file.
        retry_minutes: see `WebAddress`.
        changed: when a local file, or its name, owner or rights, last changed, in nanoseconds.
        sample: digest of parts of a local file.
    """

    path: str
    where: str
    size: int
    version: str
    ranges: bool = True
    retry_minutes: float = 0.0
    changed: int = 0
    sample: str = ""

    @classmethod
    def local(cls, path: Path, where: str) -> SourceFile:
        """A local file as it is now. Raises OSError."""
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            sample = _sample(file, found.st_size)
        return cls(str(path), where, found.st_size, str(found.st_mtime_ns), changed=found.st_ctime_ns, sample=sample)

    @property
    def name(self) -> str:
        """Its path in lower case, without a URL's question."""
        return (url_path(self.path) if is_url(self.path) else self.path).lower()

    @property
    def seekable(self) -> bool:
        """Whether any place in what `open` gives can be reached without reading what lies before."""
        return Path(self.name).suffix not in DECOMPRESSORS and (self.ranges or not is_url(self.path))

    @contextmanager
    def open(self, offset: int = 0, most: int | None = None) -> Iterator[Any]:
        """The file's bytes, decompressed, from `offset` on (where it is not `seekable`, by reading all before it).

        Args:
            most: bytes that a compressed file may have, whatever its size. (None: any number.)

        Raises:
            TooLarge: it has more, and grows more than `GROWTH` times. (Raised where it is read.)
            UserError: it has gone or changed since the start.
            OSError: it cannot be opened.
        """
        with ExitStack() as stack:
            file = stack.enter_context(self._raw())
            if decompress := DECOMPRESSORS.get(Path(self.name).suffix):
                file = stack.enter_context(decompress(file))
                if most and self.size:
                    file = _Bounded(file, max(most, GROWTH * self.size))
            if self.seekable:
                file.seek(offset)
            else:
                left = offset
                while left and (passed := file.read(min(left, SKIPPED))):
                    left -= len(passed)
            yield file

    def _raw(self) -> Any:
        if is_url(self.path):
            return WebAddress(self.path, self.where, self.size, self.version, self.ranges, self.retry_minutes).open()
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (handed over open)
        except FileNotFoundError:
            raise UserError(f"{self.where}: {self.path} is no longer there; put it back, and start again: {AGAIN}") from None
        now = os.fstat(file.fileno())
        if (now.st_size, str(now.st_mtime_ns)) != (self.size, self.version):
            file.close()
            size = f"was {self.size} bytes, now {now.st_size}" if now.st_size != self.size else "it was written again"
            raise UserError(f"{self.where}: {self.path} has changed since the run started ({size}); put the former file back, "
                            "or begin a new run")
        if now.st_ctime_ns != self.changed:
            self._compare(file, now.st_size)
        return file

    def _compare(self, file: BinaryIO, size: int) -> None:
        """Look into a file that was changed, but not written as far as its time says: linked, touched, or copied with its time.

        Raises:
            UserError: its content is another.
        """
        if _sample(file, size) != self.sample:
            file.close()
            raise UserError(f"{self.where}: {self.path} has changed since the run started (another content, the former time); "
                            "put the former file back, or begin a new run")
        file.seek(0)
        if size > 3 * SAMPLE and self.path not in _warned:
            _warned.add(self.path)
            log.warning("%s: %s was touched or copied since the run started; its size, time, beginning, middle and end are the "
                        "same, and it is read on", self.where, self.path)


def _sample(file: BinaryIO, size: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for at in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)) if size > 3 * SAMPLE else (0,):
        file.seek(at)
        digest.update(file.read(SAMPLE if size > 3 * SAMPLE else size))
    return digest.hexdigest()
