"""One question to a web server and its answer, in bounded time whatever the server does.

The time-outs of HTTP clients count from byte to byte: a server that sends a header a second holds them for ever. Here the whole
head of an answer has a deadline, redirects included, and its body must come at a least speed; only waiting for bytes counts,
not what is done with them meanwhile.
"""

from __future__ import annotations

import http.client
import io
import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

log = logging.getLogger("genscale")
SLOWEST = 4096
"""Bytes a second that a body must come at, in the long run."""
REDIRECTS = 10
"""Longest way from one address to the next."""
CONNECTIONS = 64
"""Kept for each server: there may be one for every lane."""
PORTS = {"http": 80, "https": 443}


class Patience:
    """How long an answer may still be waited for.

    Args:
        seconds: for all of its head; then for its body, beyond what `SLOWEST` allows.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = self._left = seconds
        self._in_body = False

    def body_begins(self) -> None:
        self._left, self._in_body = self._seconds, True

    def wait(self, sock: Any, read: Callable[[], int | None]) -> int | None:
        """The bytes that `read` takes from the socket. Raises TimeoutError."""
        if self._left > 0:
            sock.settimeout(self._left)
            started, count = time.monotonic(), None
            try:
                count = read()
                return count
            except TimeoutError:
                pass
            finally:
                gained = (count or 0) / SLOWEST if self._in_body else 0.0
                self._left = min(self._seconds, self._left - (time.monotonic() - started) + gained)
        if self._in_body:
            raise TimeoutError(f"its answer came to a standstill: {self._seconds:g} s behind {SLOWEST} bytes a second")
        raise TimeoutError(f"no answer within {self._seconds:g} s")


_patience: ContextVar[Patience] = ContextVar("patience")


class _Watched(io.RawIOBase):
    """What comes from a socket, as long as there is patience."""

    def __init__(self, sock: Any, raw: Any, patience: Patience) -> None:
        self._sock, self._raw, self._patience = sock, raw, patience

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int | None:
        return self._patience.wait(self._sock, lambda: self._raw.readinto(buffer))

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        self.fp = io.BufferedReader(_Watched(sock, self.fp.detach(), _patience.get()))


class _Connection(HTTPConnection):
    response_class = _Answer


class _SecureConnection(HTTPSConnection):
    response_class = _Answer


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


class _Adapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **named: Any) -> None:
        super().init_poolmanager(*arguments, **named)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}

    def proxy_manager_for(self, *arguments: Any, **named: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **named)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        return manager


class _Session(requests.Session):
    def resolve_redirects(self, *_: Any, **__: Any) -> Generator[requests.Response, None, None]:
        yield from ()  # it reads the bodies of redirects, however long they are


@lru_cache(maxsize=1)
def _session() -> requests.Session:
    """Keeps its connections. It knows no scheme but http and https."""
    session = _Session()
    session.adapters.clear()
    for scheme in PORTS:
        session.mount(f"{scheme}://", _Adapter(pool_maxsize=CONNECTIONS))
    return session


def ask(url: str, headers: Mapping[str, str], seconds: float) -> requests.Response:
    """The answer with its body still to be read from `raw`.

    Raises:
        requests.RequestException: there is none within `seconds`, or it leads nowhere.
    """
    patience = Patience(seconds)
    _patience.set(patience)
    address, started = url, time.monotonic()
    for _ in range(REDIRECTS + 1):
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            raise requests.ConnectTimeout(f"no answer within {seconds:g} s")
        response = _session().get(address, headers=headers, auth=_credentials(address, url), stream=True, timeout=left,
                                  allow_redirects=False)
        target = _session().get_redirect_target(response)
        if target is None:
            patience.body_begins()
            return response
        response.close()
        try:
            address = requests.utils.requote_uri(urljoin(address, target))
            scheme = urlsplit(address).scheme
        except ValueError as error:
            raise requests.exceptions.InvalidURL(f"it leads to an address that is none: {error}") from None
        if scheme not in PORTS:
            raise requests.exceptions.InvalidSchema(f"it leads to an address of {scheme[:20]}: (neither http nor https)")
    raise requests.exceptions.TooManyRedirects(f"it leads on to other addresses more than {REDIRECTS} times")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)


def _credentials(url: str, asked: str) -> Callable[[Any], Any]:
    """User and password of ~/.netrc, which knows hosts and no ports: for the server that the setting names, and for those it
    leads to only where they are reached by https at its usual port."""
    scheme, host, port = _origin(url)
    if _origin(url) != _origin(asked) and (scheme, port) != ("https", PORTS["https"]):
        return lambda request: request
    found = requests.utils.get_netrc_auth(url)
    if found is None:
        return lambda request: request
    if port != PORTS[scheme]:
        _say_port(host, port)
    return requests.auth.HTTPBasicAuth(*found)


@cache
def _say_port(host: str, port: int) -> None:
    log.warning("the user and password of %s in ~/.netrc, which knows no ports, are sent to its port %d", host, port)
