"""A reward that a server gives, at an address that the site allows."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import netrc
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from genscale.errors import SourceLost, UserError
from genscale.masking import has_mask, masked
from genscale.rewards.asking import NoJudgement, insist, numbers
from genscale.rewards.base import Answer, TextReward
from genscale.rewards.program import BEAT_SECONDS, asked_of
from genscale.rewards.site import read_reward_site

MOST_BYTES = 2**24
"""Bytes of a reply."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries; each is twice the one before."""
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class WebSettings:
    """Which server judges, and how long it is waited for."""

    url: str
    """Address that answers are posted to; the site's file must allow it (rewards.addresses)."""
    columns: list[str] = field(default_factory=list)
    """Columns of the prompt's row that it is told."""
    seconds: float = 60.0
    """For one request, from its beginning to the last byte of the reply."""
    retry_minutes: float = 5.0
    """How long a server that does not answer, or answers 429 or 5xx, is tried again before the run ends."""

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise UserError(f"seconds: must be above 0, not {self.seconds:g}")
        if self.retry_minutes < 0:
            raise UserError(f"retry_minutes: must be at least 0, not {self.retry_minutes:g}")


class _Unanswered(Exception):
    """A server has not answered, which may be otherwise in a while."""


class WebReward(TextReward):
    """What a server says of answers: {"answers": [...]} is posted to it, and {"rewards": [a number each]} is its reply.

    Where it asks for a name and a password, they are those of `~/.netrc` for its host.
    """

    settings = WebSettings
    repeatable = False

    def __init__(self, asked: WebSettings) -> None:
        super().__init__(asked)
        if has_mask(asked.url):
            raise UserError(f"url: {asked.url}: its token was left out when this was written; give the whole address")
        self._address = read_reward_site().check_address(asked.url)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the server is told."""
        return tuple(self.asked.columns)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """What it says.

        Raises:
            SourceLost: it does not answer.
            UserError: it refuses, or answers otherwise.
        """
        body = json.dumps({"answers": [asked_of(answer, self.asked.columns) for answer in answers]}, default=str).encode()
        return insist(lambda: self._judged(body, len(answers)), masked(self.asked.url))

    def _judged(self, body: bytes, count: int) -> list[float]:
        reply = self._reply(body)
        try:
            return numbers(json.loads(reply)["rewards"], count)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise NoJudgement(f'said {reply[:80]!r}, and not {{"rewards": [...]}}') from None

    def _reply(self, body: bytes) -> bytes:
        end, wait = time.monotonic() + 60 * self.asked.retry_minutes, FIRST_WAIT
        while True:
            try:
                return self._request(body)
            except _Unanswered as error:
                if time.monotonic() + wait > end:
                    raise SourceLost(f"url: {self.asked.url} has not answered for {self.asked.retry_minutes:g} minutes "
                                     f"({error}); start the run again when it does, and it goes on from its latest "
                                     "checkpoint") from None
                self._wait(wait, f"the server does not answer ({error})")
                wait = min(2 * wait, LONGEST_WAIT)

    def _wait(self, seconds: float, doing: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.progress(doing)
            time.sleep(min(left, BEAT_SECONDS))

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": "genscale"}
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(self._address.hostname or "")
            if found:
                headers["Authorization"] = "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()
        return headers

    def _request(self, body: bytes) -> bytes:
        """One request, in a thread: a server that sends a byte now and then would never meet a socket's own deadline."""
        outcome: queue.Queue[tuple[int, bytes] | Exception] = queue.Queue()
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=self.asked.seconds)
        opened: list[socket.socket] = []
        path = (self._address.path or "/") + (f"?{self._address.query}" if self._address.query else "")

        def work() -> None:
            try:
                connection.connect()
                opened.append(connection.sock)
                connection.request("POST", path, body, self._headers())
                response = connection.getresponse()
                outcome.put((response.status, response.read(MOST_BYTES + 1)))
            except Exception as error:  # to be raised where it is waited for
                outcome.put(error)
            finally:
                connection.close()

        threading.Thread(target=work, name="reward", daemon=True).start()
        deadline = time.monotonic() + self.asked.seconds
        while True:
            try:
                found = outcome.get(timeout=max(0.0, min(BEAT_SECONDS, deadline - time.monotonic())))
                break
            except queue.Empty:
                if time.monotonic() >= deadline:
                    for each in opened:  # the thread then reads its end; to close what it is reading would wait for it
                        with contextlib.suppress(OSError):
                            each.shutdown(socket.SHUT_RDWR)
                    raise _Unanswered(f"no reply in {self.asked.seconds:g} seconds") from None
                self.progress("waiting for the server")
        if isinstance(found, Exception):
            raise _Unanswered(f"{type(found).__name__}: {found}") from None
        return self._content(*found)

    def _content(self, status: int, content: bytes) -> bytes:
        if status in TRY_AGAIN:
            raise _Unanswered(f"HTTP {status}")
        if status != 200:  # redirections among them, which would lead to where the site has allowed nothing
            raise UserError(f"url: {self.asked.url} answers with HTTP {status}: {content[:200].decode(errors='replace')}")
        if len(content) > MOST_BYTES:
            raise NoJudgement(f"said more than {MOST_BYTES:,} bytes")
        return content
