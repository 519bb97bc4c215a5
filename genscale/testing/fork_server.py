"""The server of `genscale.testing.forks`: `python -m genscale.testing.fork_server DESCRIPTOR`, of a socket that listens."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from genscale.testing import group
from genscale.testing.forks import paths


def serve(listener: socket.socket) -> None:
    """Fork what is asked for, until whoever started this process is gone: then standard input ends. Forked processes do not
    return."""
    running: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    with selectors.DefaultSelector() as selector:
        for source in (0, woken, listener.fileno()):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fd for key, _ in selector.select()]
            if 0 in ready:
                return
            if woken in ready:
                os.read(woken, 4096)
                _tell_ends(running)
            if listener.fileno() in ready:
                connection, _ = listener.accept()
                if (begun := socket.recv_fds(connection, 8, 3))[0]:  # else who asked is gone already
                    with connection.makefile("rb") as said:
                        asked = json.loads(said.read(int.from_bytes(begun[0], "big")))
                    with contextlib.suppress(Exception):  # the forked process meets and tells it
                        group.load(asked["words"])
                    if not (pid := os.fork()):
                        signal.set_wakeup_fd(-1)
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        selector.close()
                        for other in (listener, connection, *running.values()):
                            other.close()
                        _begin(asked["environment"], asked["folder"], begun[1])
                        sys.exit(group.main(asked["processes"], asked["words"]))
                    running[pid] = connection
                    _tell(connection, pid)
                for stream in begun[1]:
                    os.close(stream)


def _tell(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # who asked may be gone
        connection.sendall(f"{number}\n".encode())


def _tell_ends(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection:
                _tell(connection, os.waitstatus_to_exitcode(status))


def _begin(environment: dict[str, str], folder: str, streams: Sequence[int]) -> None:
    """Become what a new process would be."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those that Python has made may have been of another kind: of a file where this is a pipe.
    sys.stdin = os.fdopen(0, encoding=sys.stdin.encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding=sys.stderr.encoding, errors="backslashreplace", closefd=False)
    known, asked = set(paths(os.environ)), paths(environment)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder, *asked, *(path for path in sys.path[1:] if path not in known)]
    time.tzset()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        serve(listening)
        place = Path(listening.getsockname())
        place.unlink()
        place.parent.rmdir()
