"""`genscale` in processes of its own: start it, wait for its end, kill it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

FOREIGN = ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_", "WANDB_", "GENSCALE_", "SLURM_", "RANK", "WORLD_SIZE",
           "LOCAL_RANK", "DS_ACCELERATOR")
"""Variables of a launcher, of another run or of this shell, none of which may reach a run that is looked at."""


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: its exit code; negative for the signal that ended it, None where it was killed for taking too long.
        out, err: what it printed.
    """

    code: int | None
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that a user's mistake comes to, or the last line that it printed of what went wrong."""
        lines = [line for line in (self.out + self.err).splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return said[0] if said else "hung" if self.code is None else lines[-1] if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Running:
    """A command that was started.

    Attributes:
        process: leads a session of its own.
        out, err: files that it prints to: nobody has to read a pipe meanwhile.
    """

    process: subprocess.Popen[bytes]
    out: tempfile._TemporaryFileWrapper[bytes]
    err: tempfile._TemporaryFileWrapper[bytes]

    def kill(self) -> None:
        """Send SIGKILL to it and all its descendants."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            family = [*parent.children(recursive=True), parent]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family[:-1], timeout=30)
        self.process.wait()

    def finish(self, timeout: float = 300) -> Outcome:
        """Wait for its end; after so many seconds it is killed."""
        try:
            code: int | None = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.kill()
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Outcome(code, *texts)


def start(*words: object, environment: dict[str, str] | None = None, script: str | None = None) -> Running:
    """Start `genscale <words>` and return at once.

    Args:
        environment: variables besides those of this process.
        script: the program to start in genscale's place: one that registers a family of its own, and calls `genscale.start`.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    variables = {"OMP_NUM_THREADS": "1", **kept, **(environment or {})}
    out, err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by `finish`
    program = [script] if script else ["-m", "genscale"]
    process = subprocess.Popen([sys.executable, *program, *map(str, words)], env=variables, stdin=subprocess.DEVNULL,
                               stdout=out, stderr=err, start_new_session=True, preexec_fn=_not_deaf)
    return Running(process, out, err)


def run(*words: object, timeout: float = 300, environment: dict[str, str] | None = None, script: str | None = None) -> Outcome:
    """Run `genscale <words>` to its end; see `start`.

    Example:
        >>> run("--version").code
        0
    """
    return start(*words, environment=environment, script=script).finish(timeout)


def _not_deaf() -> None:
    # What a shell starts in the background ignores Ctrl-C, under nohup the end of the terminal, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
