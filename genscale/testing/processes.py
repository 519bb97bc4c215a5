"""`genscale` in processes of its own: start it, wait for its end, kill it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from genscale.testing.forks import Forked, ForkServer, fork, hear_signals

if TYPE_CHECKING:
    import psutil

GENSCALE = (sys.executable, "-m", "genscale")
GROUP = (sys.executable, "-m", "genscale.testing.group")
PACKAGE = Path(__file__).resolve().parents[1]
FOREIGN = ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_", "WANDB_", "GENSCALE_", "SLURM_", "RANK", "WORLD_SIZE",
           "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR")
"""Variables of a launcher, of another run or of this shell, none of which may reach a run that is looked at."""
SITE = "GENSCALE_SITE"
"""Set by who owns the machine, and by no run."""
LINGER = 5.0
"""Seconds that the children of a command may outlive it."""


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: its exit code; negative for the signal that ended it, None where it was killed for taking too long.
        out, err: what it printed.
        left_behind: its children that lived on, and were killed.
    """

    code: int | None
    out: str
    err: str
    left_behind: tuple[str, ...] = ()

    @property
    def error(self) -> str:
        """The line that a user's mistake comes to, or the last line that it printed of what went wrong."""
        said = self.errors()
        lines = [line for line in (self.out + self.err).splitlines() if line.strip()]
        return said[0] if said else "hung" if self.code is None else lines[-1] if lines else f"exit code {self.code}"

    def errors(self) -> list[str]:
        """What its lines `error: ...` say."""
        return [line.removeprefix("error: ") for line in (self.out + self.err).splitlines() if line.startswith("error: ")]

    def message(self) -> str:
        """The one line that a user's mistake comes to, after `error: `, with nothing beside it.

        Raises:
            AssertionError: it ended otherwise.
        """
        assert len(self.err.splitlines()) == 1 and self.err.startswith("error: "), self._whole()
        return self.message_of_run()

    def message_of_run(self) -> str:
        """The same of a run that had begun: its own lines stand before it.

        Raises:
            AssertionError: it ended otherwise.
        """
        assert self.code == 2 and len(self.errors()) == 1 and "Traceback" not in self.out + self.err, self._whole()
        return self.errors()[0]

    def one_error(self) -> str:
        """The one `error: ` line of several processes, whatever their launcher adds; no traceback of genscale.

        Raises:
            AssertionError: they ended well, or said something else.
        """
        text, said = self.out + self.err, self.errors()
        assert self.code != 0 and len(said) == 1 and text.count(f"error: {said[0]}") == 1, self._whole()
        assert not [line for line in text.splitlines() if line.lstrip().startswith(f'File "{PACKAGE}/')], self._whole()
        return f"error: {said[0]}"

    def _whole(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@dataclass(frozen=True)
class Running:
    """A command that was started.

    Attributes:
        process: leads a session of its own.
        out, err: files that it prints to: nobody has to read a pipe meanwhile.
    """

    process: subprocess.Popen[bytes] | Forked
    out: tempfile._TemporaryFileWrapper[bytes]
    err: tempfile._TemporaryFileWrapper[bytes]
    _family: set[psutil.Process] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self.process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.process.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to its process alone."""
        self.process.send_signal(number)

    def printed(self) -> str:
        """What it has printed until now, errors last."""
        return "".join(Path(file.name).read_text(errors="replace") for file in (self.out, self.err))

    def _remember_children(self) -> None:
        # Who has lost its parent is found no more.
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(psutil.Process(self.pid).children(recursive=True))

    def kill(self) -> None:
        """Send SIGKILL to it and all its descendants."""
        import psutil

        if self.poll() is None:
            self._remember_children()
            self.process.kill()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._family, timeout=30)
        self.process.wait()

    def finish(self, timeout: float = 300) -> Outcome:
        """Wait for its end; after so many seconds it is killed. So are children that outlive it by five seconds."""
        import psutil

        deadline, left = time.monotonic() + timeout, []
        try:
            while self.poll() is None and time.monotonic() < deadline:
                self._remember_children()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.1)
            code = self.poll()
            if code is not None:
                left = psutil.wait_procs(self._family, timeout=LINGER)[1]
        finally:
            self.kill()
        out, err = (Path(file.name).read_text(errors="replace") for file in (self.out, self.err))
        self.out.close()
        self.err.close()
        return Outcome(code, out, err, tuple(map(str, left)))


def clean_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what a launcher or another run has left in it, with `variables` added; one thread a
    process, where it does not say how many."""
    kept = {name: value for name, value in os.environ.items() if name == SITE or not name.startswith(FOREIGN)}
    return {"OMP_NUM_THREADS": "1", **kept, **(variables or {})}


def group(processes: int, *words: str) -> tuple[str, ...]:
    """The command that runs a script in so many processes out of one import, for `start` and `run`, which have all of them out
    of the same one; `genscale` itself with `-m`, `genscale` as words. What is forked cannot use CUDA: where there is a GPU, one
    process is started, and several are for what stays on the CPU. See `genscale.testing.group` and `genscale.testing.forks`."""
    return (*GROUP, str(processes), *words)


def torchrun(processes: int) -> tuple[str, ...]:
    """The command that starts a script in so many processes, for `start` and `run`."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))


def start(*words: object, command: tuple[str, ...] = (), environment: Mapping[str, str] | None = None,
          folder: Path | None = None) -> Running:
    """Start `genscale <words>` and return at once.

    Args:
        command: another command than `genscale`, to which the words are given.
        environment: variables besides those of this process.
        folder: to start it in; without one, the current folder.

    Example:
        >>> running = start("--version")
        >>> running.finish().code
        0
    """
    out, err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by `finish`
    program, variables = [*(command or GENSCALE), *map(str, words)], clean_environment(environment)
    if tuple(program[:3]) == GROUP:
        from genscale.parallel.processes import on_cpu  # loads torch, which other commands do not need

        count, forked = int(program[3]), program[4:]
        if on_cpu() and (server := _fork_server()).can_fork(variables):
            with open(os.devnull) as nothing:
                streams = [nothing.fileno(), out.fileno(), err.fileno()]
                return Running(fork(server.address, count, forked, variables, folder, streams), out, err)
        if count == 1:
            program = [sys.executable, *forked]
    process = subprocess.Popen(program, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder,
                               start_new_session=True, preexec_fn=hear_signals)
    return Running(process, out, err)


def run(*words: object, timeout: float = 300, command: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None, folder: Path | None = None) -> Outcome:
    """Run `genscale <words>`, or another command, to its end; see `start`.

    Example:
        >>> run("--version").code
        0
    """
    return start(*words, command=command, environment=environment, folder=folder).finish(timeout)


_starting = threading.Lock()
_server: ForkServer | None = None


def _fork_server() -> ForkServer:
    global _server
    with _starting:
        if _server is None or not _server.alive:
            _server = ForkServer(clean_environment())
        return _server
