"""What the launcher asked for, and how `genscale train --processes N` becomes N processes.

Accelerate's launcher speaks to its workers through environment variables. This module reads them once, holds them against the
run's `parallel` section, and then removes those through which Accelerate would quietly decide a second time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from genscale import exit_codes
from genscale.errors import UserError


@dataclass(frozen=True)
class LaunchRequest:
    """What the launcher was configured with; None where it said nothing.

    Attributes:
        strategy: `zero1`, `zero2`, `zero3` or `fsdp2`. Accelerate's MULTI_GPU and torchrun only start processes: None.
        offload: `cpu` when DeepSpeed was asked to keep the optimizer state in host memory.
        precision: `bf16` or `fp16`. Accelerate's default "no" is silence, not a wish for fp32.
        world_size, rank, local_rank: this process among all processes, and among those of its machine.
    """

    strategy: str | None
    offload: str | None
    precision: str | None
    world_size: int
    rank: int
    local_rank: int


def read_launch_request() -> LaunchRequest:
    """Reads the environment left by `accelerate launch`, torchrun, or no launcher at all (a single process).

    Call it before `clear_launch_environment`. Raises UserError for what the launcher can be configured with and genscale
    does not do.
    """
    rank, world_size, local_rank = _read_process_numbers()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(f"mixed_precision of the launcher: {precision} is not supported; leave it out and set train.precision")
    strategy, offload = _read_strategy()
    return LaunchRequest(
        strategy=strategy,
        offload=offload,
        precision=None if precision == "no" else precision,
        world_size=world_size,
        rank=rank,
        local_rank=local_rank,
    )


def resolve_strategy(asked: str, request: LaunchRequest) -> str:
    """The strategy of the run, from `parallel.strategy` and the launcher. Raises UserError when the two contradict."""
    if asked == "auto":
        return request.strategy or ("ddp" if request.world_size > 1 else "single")
    if request.strategy not in (None, asked):
        raise UserError(
            f"parallel.strategy: {asked} contradicts the launcher, which was configured for {request.strategy}; "
            f"set parallel.strategy to {request.strategy} or auto, or launch with a file for {asked}"
        )
    if asked == "single" and request.world_size > 1:
        raise UserError(
            f"parallel.strategy: single means one process, but the launcher started {request.world_size}; "
            "nearest allowed: ddp (or auto)"
        )
    return asked


def resolve_offload(asked: str, strategy: str, request: LaunchRequest) -> str:
    """The offload of the run, from `parallel.offload` and the launcher: either may ask for it, "none" is silence on both sides.

    `strategy` is the resolved one. Raises UserError for offload without ZeRO.
    """
    offload = request.offload or asked
    if offload != "none" and not strategy.startswith("zero"):
        raise UserError(f"parallel.offload: {offload} needs ZeRO, but the strategy is {strategy}; nearest allowed: none, "
                        "or parallel.strategy zero1, zero2 or zero3")
    return offload


def resolve_precision(asked: str, request: LaunchRequest) -> str:
    """The precision of the run: `train.precision`, with auto the launcher's or the device's own. Raises UserError when the
    launcher explicitly asked for another."""
    if asked == "auto":
        from genscale.parallel.precision import native_precision
        from genscale.parallel.processes import on_cpu

        return request.precision or native_precision(on_cpu())
    if request.precision not in (None, "bf16" if asked == "fp8" else asked):  # fp8 computes in bf16 what it does not in fp8
        raise UserError(
            f"train.precision: {asked} contradicts the launcher, which was configured with mixed_precision {request.precision}"
            f"; set train.precision to {request.precision}, or leave mixed_precision out of the launcher's file"
        )
    return asked


def clear_launch_environment() -> None:
    """Removes from this process what would make Accelerate decide again, and otherwise than genscale.

    Ranks, addresses, threads and ACCELERATE_USE_CPU stay: they say who we are and on which device.
    """
    for name in list(os.environ):
        if name in _DECISIONS or name.startswith(_DECISION_PREFIXES):
            del os.environ[name]


# With these set, `Accelerator()` builds its own DeepSpeed, FSDP or Megatron plugin, and prepares with that whatever it is
# given. Under ACCELERATE_USE_CPU=true it drops the DeepSpeed plugin again, and wraps in plain DDP, without a word: genscale
# makes the DeepSpeed engine itself, so that ACCELERATE_USE_CPU means the device and nothing more. MIXED_PRECISION adds a second
# autocast, GRADIENT_ACCUMULATION_STEPS divides the loss a second time, and DYNAMO compiles the whole network.
_DECISIONS = frozenset({
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_CONFIG_DS_FIELDS",
})  # fmt: skip
_DECISION_PREFIXES = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")  # as Accelerate reads its flags


def _read_process_numbers() -> tuple[int, int, int]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = [name for name in names if name in os.environ]
    if found:
        missing = [name for name in names if name not in os.environ]
        # A lone variable (LOCAL_RANK=0 from a notebook, WORLD_SIZE=1 from a shell) is harmless; half a launcher is not.
        if missing and os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError(f"{missing[0]}: not set, although WORLD_SIZE is {os.environ['WORLD_SIZE']}; start the processes "
                            "with accelerate launch, torchrun or genscale train --processes N")
        if not missing:
            try:
                rank, world_size, local_rank = (int(os.environ[name]) for name in names)
            except ValueError:
                values = ", ".join(f"{name}={os.environ[name]}" for name in names)
                raise UserError(f"{values}: must be whole numbers; the launcher sets them") from None
            return rank, world_size, local_rank
    # `distributed_type: MULTI_CPU` and `--cpu` start ONE process whatever num_processes says, unless mpirun is used. Only this
    # one-process launcher sets ACCELERATE_USE_CPU, and MASTER_PORT beside it only when more than one was wanted.
    elif "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        raise UserError("num_processes of the launcher: more than 1 was asked for, but accelerate launch starts only one "
                        "process with --cpu or distributed_type NO or MULTI_CPU; use launch/cpu.yaml, or --num_processes 1")
    return 0, 1, 0


def _read_strategy() -> tuple[str | None, str | None]:
    """The launcher's (strategy, offload)."""
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _flag(f"ACCELERATE_USE_{name}"):
            raise UserError(f"parallel.strategy: the launcher was configured for {name.lower()}, which is not supported; "
                            "nearest allowed: launch/zero3.yaml or launch/fsdp2.yaml")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return _read_deepspeed()
    if _flag("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("fsdp_version of the launcher: 1 is not supported; nearest allowed: 2 (as in launch/fsdp2.yaml)")
        if _flag("FSDP_OFFLOAD_PARAMS"):
            raise UserError("fsdp_offload_params of the launcher: true is not supported; nearest allowed: false, or offload of "
                            "the optimizer with launch/zero3-offload.yaml")
        return "fsdp2", None
    return None, None


def _read_deepspeed() -> tuple[str, str | None]:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file is not None:
        raise UserError(f"deepspeed_config_file of the launcher: {file} would be ignored, because the run's own config sets "
                        "DeepSpeed up; use zero_stage instead (as in launch/zero2.yaml)")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
    if stage not in ("1", "2", "3"):
        raise UserError(f"zero_stage of the launcher: {stage} is not a ZeRO stage; nearest allowed: 1, or launch/ddp.yaml")
    optimizer = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    weights = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if optimizer not in ("none", "cpu"):
        raise UserError(f"offload_optimizer_device of the launcher: {optimizer} is not supported; nearest allowed: cpu")
    if weights != "none":
        raise UserError(f"offload_param_device of the launcher: {weights} is not supported; nearest allowed: none, with "
                        "offload_optimizer_device: cpu")
    return f"zero{stage}", None if optimizer == "none" else optimizer


LAUNCHER = "GENSCALE_LAUNCHER"
"""The process id of `genscale train --processes N`, in the environment of the processes that it starts."""


def has_launcher() -> bool:
    """Whether a launcher on this machine watches this process (torchrun's, which Accelerate and genscale use)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


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
        if parent != int(os.environ.get(LAUNCHER, parent)):  # it was killed before it could be followed
            os.kill(os.getpid(), number)


def launch_processes(processes: int, arguments: list[str]) -> int:
    """Runs `genscale train <arguments>` in several processes of this machine and returns the exit code (128 + n for signal n).

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP are passed on to the processes, which end by themselves after a checkpoint. What the
    processes print is all there is to see: the launcher's own traceback about a child that failed is left out. Raises
    UserError.
    """
    import torch

    gpus = torch.cuda.device_count()
    if processes < 1 or 0 < gpus < processes:
        reason = f"this machine has {gpus} GPU(s), one a process" if processes > 1 else "a run needs a process"
        raise UserError(f"--processes: {processes} is not possible: {reason}; nearest allowed: {max(1, gpus)}")
    return run_workers(processes, ["--module", "genscale", "train", *arguments])


def run_workers(processes: int, command: list[str]) -> int:
    """`launch_processes` for any command that `accelerate launch` takes: a script, or `--module` and a name, with arguments."""
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


def _explain(error: Exception, processes: int) -> int:
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
                os.kill(worker, signal.SIGTERM if number == signal.SIGHUP else number)

    # What the shell told us to ignore (nohup, a background job) stays ignored.
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    wanted = [number for number in stops if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
