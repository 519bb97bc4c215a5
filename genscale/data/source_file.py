"""A file of a source, local or at a URL, as it was found when the run started; it is decompressed while it is read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from genscale.data.web import AGAIN, WebAddress
from genscale.errors import UserError

SKIPPED = 2**20
"""Bytes stepped over at a time."""


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


DECOMPRESSORS = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _zstandard}


@dataclass(frozen=True)
class SourceFile:
    """Where a file is and what it was at the start. Holds nothing open, so that it travels to worker processes.

    Attributes:
        path: of a local file, or a URL.
        where: the setting that names the source, as `key=value`, for messages.
        size: bytes; 0 where a server does not say.
        version: a local file's time of change in nanoseconds; of a URL see `version_of`.
        ranges: whether a server gives parts of the file.
        retry_minutes: see `WebAddress`.
    """

    path: str
    where: str
    size: int
    version: str
    ranges: bool = True
    retry_minutes: float = 0.0

    @classmethod
    def local(cls, path: Path, where: str) -> SourceFile:
        """A local file as it is now. Raises OSError."""
        found = os.stat(path)
        return cls(str(path), where, found.st_size, str(found.st_mtime_ns))

    @property
    def name(self) -> str:
        """Its path in lower case, without a URL's question."""
        return (url_path(self.path) if is_url(self.path) else self.path).lower()

    @property
    def seekable(self) -> bool:
        """Whether any place in what `open` gives can be reached without reading what lies before."""
        return Path(self.name).suffix not in DECOMPRESSORS and (self.ranges or not is_url(self.path))

    @contextmanager
    def open(self, offset: int = 0) -> Iterator[Any]:
        """The file's bytes, decompressed, from `offset` on (where it is not `seekable`, by reading all before it).

        Raises:
            UserError: it has gone or changed since the start.
            OSError: it cannot be opened.
        """
        with ExitStack() as stack:
            file = stack.enter_context(self._raw())
            if decompress := DECOMPRESSORS.get(Path(self.name).suffix):
                file = stack.enter_context(decompress(file))
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
        return file
