"""Servers that drip, lie about sizes and parts, lead astray or never end: the right bytes or one line, in bounded time."""

from __future__ import annotations

import gzip
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from genscale.data import exchange, web
from genscale.data import locations as opening
from genscale.data.locations import find_urls
from genscale.data.readers import find_shards
from genscale.data.retrying import Retries, in_threads, retry_after
from genscale.data.spec import Spec
from genscale.errors import UserError

BODY = b"".join(json.dumps({"text": f"document {number} " + "x" * 50}).encode() + b"\n" for number in range(300))
FOUND = b"HTTP/1.1 302 Found\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
Reply = Callable[[socket.socket, dict[str, str]], None]


@pytest.fixture
def hostile() -> Iterator[Callable[[Reply], str]]:
    """hostile(reply) -> the address of a server on which `reply(connection, request)` answers each request in its own bytes."""
    servers: list[socket.socket] = []

    def start(reply: Reply) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve(connection: socket.socket) -> None:
            try:
                while head := _head(connection):
                    reply(connection, head)
            except OSError:  # the reader has gone, or the test is over
                pass
            finally:
                connection.close()

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def _head(connection: socket.socket) -> dict[str, str]:
    text = b""
    while b"\r\n\r\n" not in text:
        if not (more := connection.recv(4096)):
            return {}
        text += more
    lines = text.decode().split("\r\n")
    return {"path": lines[0].split()[1], **dict(line.lower().split(": ", 1) for line in lines[1:] if line)}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(opening, "URL_SECONDS", 0.6)
    monkeypatch.setattr(opening, "START_MINUTES", 0.0)
    monkeypatch.setattr(web, "SECONDS", 0.6)


def drip(*pieces: bytes, forever: bytes = b"", pause: float = 0.1) -> Reply:
    def reply(connection: socket.socket, _: dict[str, str]) -> None:
        for piece in itertools.chain(pieces, itertools.repeat(forever)):
            connection.sendall(piece)
            time.sleep(pause)

    return reply


def say(*pieces: bytes) -> Reply:
    return lambda connection, _: connection.sendall(b"".join(pieces))


def ranged(first_answer: bytes, then: Callable[[int, int], bytes]) -> Reply:
    """The first byte as it should be, so that the start is content; then `then(first, stop)`."""
    def reply(connection: socket.socket, request: dict[str, str]) -> None:
        first, last = map(int, request["range"].removeprefix("bytes=").split("-"))
        connection.sendall(first_answer if last == 0 else then(first, last + 1))

    return reply


def part(content: bytes, first: int, last: int, size: object = len(BODY), length: int | None = None) -> bytes:
    return (f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{size}\r\n"
            f"Content-Length: {len(content) if length is None else length}\r\n\r\n").encode() + content


GOOD = part(BODY[:1], 0, 0)
START = {
    "headers that never end": (drip(OK, forever=b"X-Wait: 1\r\n"), "no answer within 0.6 s"),
    "one header that never ends": (drip(OK, b"X: ", forever=b"y"), "no answer within 0.6 s"),
    "a status that never ends": (drip(b"HTTP/1.1 200 ", forever=b"O"), "no answer within 0.6 s"),
    "nothing": (drip(b"", forever=b""), "no answer within 0.6 s"),
    "to itself": (say(b"HTTP/1.1 302 Found\r\nLocation: /a.jsonl\r\nContent-Length: 0\r\n\r\n"), "more than 10 times"),
    "to itself, slowly": (drip(b"HTTP/1.1 302 Found\r\n", b"Location: /a.jsonl\r\nContent-Length: 0\r\n\r\n", pause=0.3),
                          "no answer within 0.6 s"),
    "to a file": (say(FOUND, b"Location: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"), "an address of file:"),
    "to no address": (say(FOUND, b"Location: http://[::1\r\nContent-Length: 0\r\n\r\n"), "Invalid IPv6 URL"),
    "another part": (say(part(BODY[5:6], 5, 5)), "asked for its first byte, the server gives another part"),
    "a part of unknown place": (say(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\n{"), "gives another part"),
    "a size of 5,000 digits": (say(OK, b"Content-Length: ", b"9" * 5000, b"\r\n\r\n"), "does not give parts of a file"),
    "digits of another script": (say(OK, "Content-Length: ²\r\n\r\n".encode("latin-1")), "does not give parts of a file"),
    "a bomb": (say(OK, b"Content-Encoding: gzip\r\nContent-Length: 99\r\n\r\n", gzip.compress(bytes(2**20))),
               "it is sent as gzip, which was not asked for"),
    "words for a terminal": (say(b"HTTP/1.1 404 Not\x1b[2J\x9bFound ", b"z" * 9000, b"\r\nContent-Length: 0\r\n\r\n"),
                             r"the server answers 404 Not\x1b[2J\x9bFound zzz"),
}


@pytest.mark.parametrize("case", START)
def test_a_server_that_answers_wrongly_at_the_start_is_one_line_in_time(hostile, case) -> None:
    reply, words = START[case]
    address, started = f"{hostile(reply)}/a.jsonl", time.monotonic()
    with pytest.raises(UserError) as caught:
        find_urls(Spec("data.source", address), [address])
    assert time.monotonic() - started < 2.5
    assert words in str(caught.value) and len(str(caught.value)) < 400
    assert str(caught.value).startswith(f"data.source={address}: cannot be read (")


def read(address: str, minutes: float = 0.0) -> list[str]:
    shard, = find_shards(Spec("data.source", address, retry_minutes=minutes), at_least=1)
    return [row[1] for row in shard.rows()]


WHOLE = [json.loads(line)["text"] for line in BODY.splitlines()]
READING = {
    "the right part": (lambda first, stop: part(BODY[first:stop], first, stop - 1), None),
    "more than it says": (lambda first, stop: part(BODY[first:stop] + b"{}" * 100, first, stop - 1, length=stop - first), None),
    "less than it says": (lambda first, stop: part(BODY[first:stop - 9], first, stop - 1, length=stop - first), "broke off"),
    "a shorter part": (lambda first, stop: part(BODY[first:stop - 9], first, stop - 10), "the server gave bytes 0-"),
    "another part": (lambda first, stop: part(BODY[first + 1:stop + 1], first + 1, stop), "the server gave bytes 1-"),
    "another size": (lambda first, stop: part(BODY[first:stop], first, stop - 1, size=7), "has changed since the run started"),
    "an unknown part": (lambda first, stop: part(BODY[first:stop], first, stop - 1).replace(b"Content-Range", b"Content-Rage"),
                        "a part, not saying which"),
    "the whole": (lambda first, stop: OK + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, "the server answers 200 OK"),
}


@pytest.mark.parametrize("case", READING)
def test_a_part_that_is_not_what_was_asked_for_is_not_taken_for_it(hostile, case) -> None:
    then, words = READING[case]

    def reply(connection: socket.socket, request: dict[str, str]) -> None:
        ranged(GOOD, then)(connection, request)
        if "less" in case:
            connection.shutdown(socket.SHUT_RDWR)

    address = f"{hostile(reply)}/a.jsonl"
    if words is None:
        assert read(address) == WHOLE
        return
    with pytest.raises(UserError) as caught:
        read(address)
    assert words in str(caught.value)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_comes_to_a_standstill_is_given_up(hostile, chunked) -> None:
    """A byte now and then, within chunks, their sizes or plain, is less than any network gives."""
    def reply(connection: socket.socket, request: dict[str, str]) -> None:
        if not chunked and request["range"].endswith("-0"):
            return connection.sendall(GOOD)
        head = OK + b"Transfer-Encoding: chunked\r\n\r\n100;" if chunked else part(b"", 0, len(BODY) - 1, length=len(BODY))
        drip(head, forever=b" ")(connection, request)

    address, started = f"{hostile(reply)}/a.jsonl.gz" if chunked else f"{hostile(reply)}/a.jsonl", time.monotonic()
    with pytest.raises(UserError, match="came to a standstill: 0.6 s behind 4096 bytes a second"):
        read(address)
    assert time.monotonic() - started < 5


def test_a_slow_server_and_a_reader_that_pauses_are_waited_for(hostile) -> None:
    """20 kB/s for three times the limit; and a body that is read on after a longer pause than the limit."""
    def reply(connection: socket.socket, request: dict[str, str]) -> None:
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(BODY))
        for first in range(0, len(BODY), 2000):
            connection.sendall(BODY[first:first + 2000])
            time.sleep(0.1)

    address = f"{hostile(reply)}/a.txt"
    source = find_urls(Spec("data.source", address), [address])[0]
    with source.open() as file:
        first = file.read(10)
        time.sleep(1.0)
        assert first + file.read() == BODY


def test_the_way_back_from_a_redirect_costs_no_body(hostile) -> None:
    """Its body is not read, whatever it claims to be."""
    def reply(connection: socket.socket, request: dict[str, str]) -> None:
        if request["path"] == "/a.jsonl":
            bomb = gzip.compress(bytes(2**24))
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /b.jsonl\r\nContent-Encoding: gzip\r\n"
                               b"Content-Length: %d\r\n\r\n" % 10**12 + bomb)
        else:
            ranged(GOOD, lambda first, stop: part(BODY[first:stop], first, stop - 1))(connection, request)

    assert read(f"{hostile(reply)}/a.jsonl") == WHOLE


def test_passwords_of_netrc_stay_with_the_server_they_are_for(hostile, tmp_path, monkeypatch, caplog) -> None:
    """Another port of the host is another server: no redirect takes them there; where a setting names a port, it is said."""
    heard: dict[str, list[str | None]] = {"first": [], "second": []}

    def second(connection: socket.socket, request: dict[str, str]) -> None:
        heard["second"].append(request.get("authorization"))
        ranged(GOOD, lambda first, stop: part(BODY[first:stop], first, stop - 1))(connection, request)

    other = hostile(second)

    def first(connection: socket.socket, request: dict[str, str]) -> None:
        heard["first"].append(request.get("authorization"))
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {other}/b.jsonl\r\nContent-Length: 0\r\n\r\n".encode())

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login alice password PlantedPassword\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    address = hostile(first)
    assert read(f"{address}/a.jsonl") == WHOLE
    assert set(heard["second"]) == {None} and None not in heard["first"]
    said = [record.getMessage() for record in caplog.records if "netrc" in record.getMessage()]
    assert said == ["the user and password of 127.0.0.1 in ~/.netrc, which knows no ports, are sent to its port "
                    f"{address.rpartition(':')[2]}"]
    assert "Planted" not in caplog.text


@pytest.mark.parametrize(("asked", "led_to", "sent"), [
    ("https://h.org/a", "https://h.org/b", True), ("https://h.org/a", "http://h.org/b", False),
    ("https://h.org/a", "https://h.org:8443/b", False), ("http://h.org/a", "https://h.org/b", True),
    ("https://h.org/a", "https://other.org/b", True), ("https://h.org/a", "http://other.org/b", False),
    ("https://h.org:443/a", "https://h.org/b", True),
])
def test_where_a_redirect_may_take_passwords(tmp_path, monkeypatch, asked, led_to, sent) -> None:
    import requests

    (tmp_path / "netrc").write_text("default login alice password PlantedPassword\n"
                                    "machine h.org login alice password PlantedPassword\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    request = requests.Request("GET", led_to, auth=exchange._credentials(led_to, asked)).prepare()
    assert ("Authorization" in request.headers) == sent


def test_what_a_server_says_may_be_nonsense(caplog) -> None:
    Retries().add("data.source=here", "BadStatusLine: garbage\r\n", 1.0)
    assert caplog.messages == ["data.source=here: BadStatusLine: garbage; trying again in 1.0 s (retry 1)"]
    for text in ("²", "9" * 400, "Mon, 01 Jan 99999 00:00:00 GMT", "\x00", "-5"):
        assert retry_after({"Retry-After": text}) >= 0


def test_many_addresses_are_asked_by_threads_that_keep_no_program() -> None:
    assert in_threads(lambda number: number * number, range(50), 4) == [number * number for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda number: 1 // number, [3, 2, 0], 2)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_ends_a_start_that_a_server_holds_up(hostile, count) -> None:
    address = hostile(drip(OK, forever=b"X-Wait: 1\r\n", pause=0.5))
    script = ("import sys\n"
              "from genscale.supervise.signals import Stopped, StopSignal\n"
              "with StopSignal(starting=True):\n"
              "    from genscale.data.locations import find_urls\n"
              "    from genscale.data.spec import Spec\n"
              "    print('asking', flush=True)\n"
              "    try:\n"
              "        find_urls(Spec('data.source', sys.argv[1]), sys.argv[1:])\n"
              "    except Stopped:\n"
              "        sys.exit(143)\n")
    process = subprocess.Popen([sys.executable, "-c", script, *[f"{address}/{number}.jsonl" for number in range(count)]],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asking\n"
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(20) == 143
    assert time.monotonic() - started < 2
