"""Files over HTTP that outlive their server's bad moments: requests are tried again, and every byte is one of the same file.

A time-out, a reset, a body that ends too early, 429 or 5xx (see `passes`) is waited out with exponential back-off (longer where
the server says `Retry-After`), up to `retry_minutes` without a byte. A file that is gone, or is not what it was when the run
started (another size, `ETag` or `Last-Modified`), is an error at once.
"""

from __future__ import annotations

import io
import re
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from genscale.data.retrying import Passing, persist, retry_after
from genscale.errors import SourceLost, UserError

T = TypeVar("T")
SECONDS = 30.0
"""Longest wait for a connection, or for the next bytes."""
BLOCK = 2 * 2**20
"""Bytes fetched at a time."""
BLOCKS = 3
"""Blocks kept: archives and tables step back a little."""
COMPRESSED = (".gz", ".tgz", ".xz", ".bz2", ".zst")
SIZE = re.compile(r"[0-9]{1,18}")
PART = re.compile(rf"bytes ({SIZE.pattern})-({SIZE.pattern})/({SIZE.pattern}|\*)", re.IGNORECASE)
AGAIN = "a run goes on from its last checkpoint"


def passes(status: int) -> bool:
    """Whether another try may mend this answer; 501 and 505 say what the server cannot do."""
    return status in (408, 425, 429) or (500 <= status < 600 and status not in (501, 505))


def version_of(headers: Mapping[str, str]) -> str:
    """What tells a file from a later one at the same address; empty where the server does not say."""
    return (headers.get("ETag") or headers.get("Last-Modified") or "")[:200]


def innermost(error: BaseException) -> BaseException:
    """What an error came of: those of the HTTP client are wrapped several times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def cause_of(error: BaseException) -> str:
    """The same in words."""
    error = innermost(error)
    if isinstance(error, socket.gaierror):
        return "its name does not resolve"
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"


def answered(response: Any) -> str:
    """The server's answer in words, as many as one line holds."""
    return f"the server answers {response.status_code} {(response.reason or '')[:80]}".rstrip()


def part_of(headers: Mapping[str, str]) -> tuple[int, int, int | None] | None:
    """First and last byte, and the size of the whole, of an answer that is a part; None where it does not say so."""
    found = PART.fullmatch(headers.get("Content-Range", "").strip())
    return (int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])) if found else None


def size_of(headers: Mapping[str, str]) -> int | None:
    """Bytes of a whole answer, where it says so."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if SIZE.fullmatch(text) else None


@contextmanager
def answer_of(url: str, part: str | None, seconds: float | None = None) -> Iterator[Any]:
    """The server's answer with its body still to be read from `raw`.

    Args:
        part: bytes to ask for, like "0-99"; None: the whole.
        seconds: longest wait for a connection or bytes, in the place of `SECONDS`.

    Raises:
        Passing: another try may mend it.
        requests.RequestException: no try can.
    """
    import requests
    import urllib3

    from genscale.data.exchange import ask

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={part}"} if part else {})}
    try:
        with ask(url, headers, seconds or SECONDS) as response:
            if passes(response.status_code):
                raise Passing(answered(response), retry_after(response.headers))
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            # Some servers say it of files that are compressed, and mean no more than that.
            if response.ok and encoding not in ("", "identity") and not urlsplit(url).path.lower().endswith(COMPRESSED):
                raise requests.exceptions.ContentDecodingError(f"it is sent as {encoding[:80]}, which was not asked for")
            yield response
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
            urllib3.exceptions.HTTPError, OSError) as error:
        if isinstance(error, requests.exceptions.RequestException) and not isinstance(
                error, (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)):
            raise
        raise Passing(cause_of(error)) from error


@dataclass(frozen=True)
class WebAddress:
    """A file at a URL as it was found at the start.

    Attributes:
        url, where: its address, and the setting that names the source, as `key=value`, for messages.
        size: bytes; 0 where the server does not say.
        version: see `version_of`.
        ranges: whether the server gives parts of a file.
        retry_minutes: longest time to try again without a byte.
    """

    url: str
    where: str
    size: int
    version: str
    ranges: bool
    retry_minutes: float

    def open(self) -> io.BufferedIOBase:
        """The file's bytes; it can seek where the server gives parts."""
        return io.BufferedReader(WebFile(self) if self.ranges and self.size else WebStream(self), 2**16)

    def persist(self, attempt: Callable[[], T]) -> T:
        """See `persist`. Raises UserError where it was all in vain, SourceLost where it may not be later."""
        import requests

        try:
            return persist(attempt, f"{self.where}: {self.url}", self.retry_minutes)
        except Passing as failure:
            raise SourceLost(f"{self.where}: reading {self.url} broke off ({failure}; tried for data.retry_minutes="
                             f"{self.retry_minutes:g}); if it is whole, start again when the server answers: {AGAIN}") from None
        except requests.RequestException as error:
            raise UserError(f"{self.where}: reading {self.url} broke off ({cause_of(error)}); mend that, and start again: "
                            f"{AGAIN}") from None

    def check(self, response: Any, asked: tuple[int, int] | None = None) -> None:
        """Refuse an answer that is not of the file that was there at the start.

        Args:
            asked: first and last byte that were asked for; None: the whole.

        Raises:
            UserError: it is gone, or has changed, or is another part of it.
        """
        if response.status_code != (206 if asked else 200):
            advice = "put the file back"
            if response.status_code in (401, 403):
                advice = "it refuses: an expired signed address, or no right to read it; give an address or a right that holds"
            raise UserError(f"{self.where}: reading {self.url} broke off ({answered(response)}); {advice}, and start again: "
                            f"{AGAIN}")
        headers, part = response.headers, part_of(response.headers)
        if asked and (part is None or part[:2] != asked):
            found = f"bytes {part[0]}-{part[1]}" if part else "a part, not saying which"
            raise UserError(f"{self.where}: reading {self.url} broke off (asked for bytes {asked[0]}-{asked[1]}, the server "
                            f"gave {found}); mend the server, or give a local copy, and start again: {AGAIN}")
        size = part[2] if part else size_of(headers)
        compared = [(self.size, size, " bytes"), (self.version, version_of(headers), "")]
        for before, now, unit in compared:
            if before and now and before != now:
                raise UserError(f"{self.where}: {self.url} has changed since the run started (was {before}{unit}, now "
                                f"{now}{unit}); put the former file back, or begin a new run")


class WebFile(io.RawIOBase):
    """A file of which the server gives parts."""

    def __init__(self, address: WebAddress) -> None:
        self._address, self._position = address, 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._address.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, start = divmod(self._position, BLOCK)
        if self._position >= self._address.size:
            return 0
        part = self._block(number)[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            first, stop = number * BLOCK, min((number + 1) * BLOCK, self._address.size)
            self._blocks[number] = self._address.persist(lambda: self._fetch(first, stop))
            if len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _fetch(self, first: int, stop: int) -> bytes:
        with answer_of(self._address.url, f"{first}-{stop - 1}") as response:
            self._address.check(response, (first, stop - 1))
            content = response.raw.read(stop - first)
        if len(content) != stop - first:
            raise Passing(f"the server broke off after {len(content)} of {stop - first} bytes")
        return content


class WebStream(io.RawIOBase):
    """A file that the server gives as a whole only: after a failure it is fetched again, up to where it broke off."""

    def __init__(self, address: WebAddress) -> None:
        self._address, self._position = address, 0
        self._open: Any = None
        self._response: Any = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._address.persist(lambda: self._read(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, size: int) -> bytes:
        import urllib3

        try:
            if self._response is None:
                self._open = answer_of(self._address.url, None)
                self._response = self._open.__enter__()
                self._address.check(self._response)
                left = self._position
                while left and (skipped := self._response.raw.read(min(left, BLOCK))):
                    left -= len(skipped)
            content = self._response.raw.read(size)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self._hang_up()
            raise Passing(cause_of(error)) from error
        except Passing:
            self._hang_up()
            raise
        if not content and self._position < self._address.size:
            self._hang_up()
            raise Passing(f"the server broke off after {self._position} of {self._address.size} bytes")
        return content

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
        self._open = self._response = None

    def close(self) -> None:
        self._hang_up()
        super().close()
