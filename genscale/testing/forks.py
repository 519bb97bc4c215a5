"""Processes that a server forks: it imports torch once, and has each group that it is asked for out of that.

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
from collections.abc import Mapping, Sequence
from pathlib import Path

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

    Attributes:
        address: for `fork`.

    Example:
        >>> server = ForkServer(dict(os.environ))
        >>> with open(os.devnull, "r+") as nowhere:
        ...     words, streams = ["-m", "genscale", "--version"], [nowhere.fileno()] * 3
        ...     done = fork(server.address, 1, words, dict(os.environ), streams=streams)
        >>> done.wait()
        0
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        # An address has some 100 characters at most. The server removes its folder.
        place = tempfile.gettempdir()
        self.address = str(Path(tempfile.mkdtemp(prefix="genscale-", dir=place if len(place) < 60 else "/tmp")) / "forks")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen()
            command = [sys.executable, "-m", "genscale.testing.fork_server", str(listener.fileno())]
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
        others = [path for path in paths(environment) if path != str(ROOT) and Path(path, "genscale").is_dir()]
        return not others and all(name.startswith(READ_LATE) for name in names)


def fork(address: str, processes: int, words: Sequence[str], environment: Mapping[str, str], folder: Path | None = None,
         streams: Sequence[int] = (0, 1, 2)) -> Forked:
    """Begin a script, or a module after `-m`, in so many processes.

    Args:
        address: of the server, which any process of this machine may ask.
        words: the script and its arguments, see `genscale.testing.group`.
        environment: that of the processes; see `ForkServer.can_fork`.
        folder: to begin in; without one, the current folder.
        streams: file descriptors of input, output and errors.
    """
    asked = json.dumps({"processes": processes, "words": list(words), "environment": dict(environment),
                        "folder": str(folder or Path.cwd())}).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [len(asked).to_bytes(8, "big")], streams)
    connection.sendall(asked)
    return Forked(connection)


def paths(environment: Mapping[str, str]) -> list[str]:
    """The folders of PYTHONPATH."""
    return [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]


def hear_signals() -> None:
    """Undo that what a shell starts in the background ignores Ctrl-C, and under nohup the end of the terminal; so would its
    children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
