"""A server of processes: it imports torch once, and forks each group that it is asked for out of that.

To import what a toy needs takes longer than to train it, and a check of a family or a tutorial starts a dozen of them. What is
forked is a session of its own, with the environment, the folder and the streams of whoever asks, and ends as a started process
does. Two things are not as in a process of its own: libraries were imported in the environment of the server, and the hashes of
texts are those of all others.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from genscale.testing import group

ROOT = Path(__file__).resolve().parents[2]
"""The folder that genscale is in."""
READ_LATE = ("PYTHONPATH", "GENSCALE_", "PYTEST_", "SLURM_", "WANDB_")
"""Beginnings of variables that nothing reads while it is imported here."""


class Forked:
    """The first process of a group that a server forked, with what `subprocess.Popen` has of one that it started.

    Attributes:
        pid: its number.
        returncode: as that of Popen; None until `poll` or `wait` found its end.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._said = connection.makefile("r")
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        if not (line := self._said.readline()):
            raise ChildProcessError("the server of forked processes is gone")
        return int(line)

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            self.returncode = self._number()
            self._said.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to it alone, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to it alone."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A server of this process, which ends with it.

    Args:
        environment: in which it imports.

    Example:
        >>> server = ForkServer(dict(os.environ))
        >>> with open(os.devnull, "r+") as nowhere:
        ...     done = server.fork(1, ["-m", "genscale", "--version"], dict(os.environ), streams=[nowhere.fileno()] * 3)
        >>> done.wait()
        0
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        # An address has some 100 characters at most. The server removes its folder.
        self.address = str(Path(tempfile.mkdtemp(prefix="genscale-", dir="/tmp")) / "forks")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            command = [sys.executable, "-m", "genscale.testing.forks", str(listener.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                                             preexec_fn=hear_signals, pass_fds=[listener.fileno()])
        atexit.register(self.close)

    def close(self) -> None:
        """End the server; what it forked goes on."""
        atexit.unregister(self.close)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def can_fork(self, environment: Mapping[str, str]) -> bool:
        """Whether a process with this environment may come out of what was imported."""
        names = {name for name in {*environment, *self._environment} if environment.get(name) != self._environment.get(name)}
        others = [path for path in _paths(environment) if path != str(ROOT) and Path(path, "genscale").is_dir()]
        return not others and all(name.startswith(READ_LATE) for name in names)

    def fork(self, processes: int, words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None,
             streams: Sequence[int] = (0, 1, 2)) -> Forked:
        """Begin a script, or a module after `-m`, in so many processes.

        Args:
            words: the script and its arguments, see `genscale.testing.group`.
            environment: that of the processes; see `can_fork`.
            folder: to begin in; without one, the current folder.
            streams: file descriptors of input, output and errors.
        """
        return fork(self.address, processes, words, environment, folder, streams)


def fork(address: str, processes: int, words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None,
         streams: Sequence[int] = (0, 1, 2)) -> Forked:
    """`ForkServer.fork` of a server of another process, by its address."""
    asked = json.dumps({"processes": processes, "words": list(words), "environment": dict(environment),
                        "folder": str(folder or Path.cwd())}).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [len(asked).to_bytes(8, "big")], streams)
    connection.sendall(asked)
    return Forked(connection)


def _paths(environment: Mapping[str, str]) -> list[str]:
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def hear_signals() -> None:
    """Undo that what a shell starts in the background ignores Ctrl-C, and under nohup the end of the terminal; so would its
    children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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
    known, asked = set(_paths(os.environ)), _paths(environment)
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
