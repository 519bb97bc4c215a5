"""How `genscale train --processes N` becomes N processes, and how these end with it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from genscale import exit_codes
from genscale.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHER = "GENSCALE_LAUNCHER"
"""The process id of `genscale train --processes N`, in the environment of the processes that it starts."""


def has_launcher() -> bool:
    """Whether a launcher on this machine watches this process (torchrun's, which Accelerate and genscale use)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


_launcher: int | None = None


def launcher_is_gone() -> bool:
    """Whether what this process has followed ended before it."""
    return _launcher is not None and os.getppid() != _launcher


def follow_launcher(starting: bool = False) -> None:
    """Lets a worker end when its launcher is killed outright, instead of training on as an orphan (Linux only).

    Workers live in sessions of their own, so nothing else reaches them then. They get SIGTERM, and answer with a checkpoint:
    call it once the handler is in place. One that is `starting` has nothing to save and gets SIGKILL: while it waits for the
    others to meet, at an address that was the launcher's, it would answer nothing less.
    """
    if sys.platform == "linux" and has_launcher():
        pr_set_pdeathsig, number = 1, signal.SIGKILL if starting else signal.SIGTERM  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number, 0, 0, 0)
        parent = os.getppid()
        global _launcher
        _launcher = _launcher or parent
        if parent != int(os.environ.get(LAUNCHER, parent)):  # it was killed before it could be followed
            os.kill(os.getpid(), number)


def launch_processes(processes: int, arguments: list[str], script: str | None = None,
                     listening: Callable[[], object] = lambda: None) -> int:
    """Runs `genscale train <arguments>` (or `<script> train <arguments>`) in several processes of this machine and returns the
    exit code (128 + n for signal n).

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP are passed on to the processes, which end by themselves after a checkpoint. What the
    processes print is all there is to see: the launcher's own traceback about a child that failed is left out. Raises
    UserError.
    """
    import torch

    gpus = torch.cuda.device_count()
    if processes < 1 or 0 < gpus < processes:
        reason = f"this machine has {gpus} GPU(s), one a process" if processes > 1 else "a run needs a process"
        raise UserError(f"--processes: {processes} is not possible: {reason}; nearest allowed: {max(1, gpus)}")
    return run_workers(processes, [*([script] if script else ["--module", "genscale"]), "train", *arguments], listening)


def run_workers(processes: int, command: list[str], listening: Callable[[], object] = lambda: None) -> int:
    """`launch_processes` for any command that `accelerate launch` takes: a script, or `--module` and a name, with arguments.

    `listening` is called when signals go to the processes: from then on this one waits for them, however long they take to end.
    """
    # Imported here: every worker reads this module, and only the launching process needs these.
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = os.environ.get("OMP_NUM_THREADS") or max(1, _cores() // processes)
    with tempfile.TemporaryDirectory(prefix="genscale-launch-") as folder:
        # A file of our own, or Accelerate would read the user's default one. MULTI_GPU is its word for "start processes with
        # torchrun" and is right without a GPU too; MULTI_CPU starts one process only. Port 0: any free one.
        file = Path(folder) / "launch.yaml"
        file.write_text("{distributed_type: MULTI_GPU, num_machines: 1, main_process_port: 0}\n")
        options = {"config_file": file, "num_processes": processes, "num_cpu_threads_per_process": threads}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        settings = launch_command_parser().parse_args([*words, *command])
        # The elastic agent's own handlers kill the processes 30 s after a signal, in the middle of a large checkpoint.
        settings.signals_to_handle = "SIGQUIT"
        _quieten_agent()
        # On a machine without a GPU, DeepSpeed would say so on every start.
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ[LAUNCHER] = str(os.getpid())
        with _pass_signals_on():
            try:
                listening()
                launch_command(settings)
            except ChildFailedError as error:
                return _explain(error, processes)
            except SignalException as error:
                return exit_codes.of_signal(error.sigval)
            finally:
                del os.environ[LAUNCHER]
    return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quieten_agent() -> None:
    """Silences the agent's account of a failure that the failing process has already told; LOGLEVEL brings it back."""
    if "LOGLEVEL" not in os.environ:
        for name in ("run", "elastic.agent.server.api", "elastic.multiprocessing.api"):
            logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)


def _explain(error: ChildFailedError, processes: int) -> int:
    rank, failure = error.get_first_failure()
    if any(each.exitcode == exit_codes.HANG for each in error.failures.values()):
        return exit_codes.HANG  # the watchdog has said why, and killed the process that hung
    if failure.exitcode >= 0:
        return failure.exitcode
    # A killed process could not say anything itself.
    cause = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
    name = signal.Signals(-failure.exitcode).name
    print(f"genscale: process {rank} of {processes} was ended by {name}{cause}; the others were stopped", file=sys.stderr)
    return exit_codes.of_signal(-failure.exitcode)


def _leads_session(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


@contextmanager
def _pass_signals_on() -> Iterator[None]:
    """Sends signals to every worker instead of ending this process; it ends when they have."""
    import psutil

    def pass_on(number: int, _: FrameType | None) -> None:
        # The agent makes each worker the leader of a session, so a terminal's Ctrl-C reaches this process alone.
        workers = [child.pid for child in psutil.Process().children() if _leads_session(child.pid)]
        if not workers:
            raise SystemExit(exit_codes.of_signal(number))
        for worker in workers:
            with suppress(ProcessLookupError):  # it may have ended meanwhile
                os.kill(worker, number)

    # What the shell told us to ignore (nohup, a background job) stays ignored.
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    wanted = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
