"""What `genscale doctor` looks at: the quick part that every job begins with, and the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from genscale.cluster.checks import Check, host_name, run_checks
from genscale.cluster.device_checks import check_computing, check_driver
from genscale.cluster.job_nodes import check_nodes, compare_versions, job_hosts
from genscale.cluster.node_checks import (
    Load,
    check_cores,
    check_extension_builds,
    check_limits,
    check_shared_memory,
    check_versions,
)
from genscale.cluster.promised_devices import check_promised
from genscale.cluster.storage_checks import QUICK_BYTES, SPEED_BYTES, check_run_folder
from genscale.errors import UserError
from genscale.settings.config import Config, DataSettings, TrackingSettings

NODE_SECONDS = 30.0
"""Longest wait for what a sound node answers within one."""
SOURCE_SECONDS = 120.0
"""The same of a server that is tried again, or a hub."""
ROLL_CALL_SECONDS = 60.0
"""For all processes of a group to come."""
COLLECTIVE_MINUTES = 4.0
"""A collective may have to wait for a process that waits for a source."""


def node_check(run_folder: Path, load: Load, size: int = QUICK_BYTES) -> list[Check]:
    """What can be told of this node in a few seconds, without loading torch.

    Args:
        size: bytes written to measure the speed of the run folder's disk.
    """
    return run_checks([
        ("versions", check_versions),
        ("GPUs", check_driver),
        ("promised GPUs", check_promised),
        ("CPU cores", lambda: check_cores(load)),
        ("limits", lambda: check_limits(load)),
        ("shared memory", lambda: check_shared_memory(load)),
        ("extension builds", check_extension_builds),
        ("run folder", lambda: check_run_folder(run_folder, size)),
    ], NODE_SECONDS)


def quick_check(run_folder: Path, workers: int = 0) -> list[Check]:
    """What a job begins with, on each of its nodes. Never raises: what goes wrong is a failure in the list, and `of_node` says
    whether another node would do better.

    Args:
        run_folder: the run's; it need not be there yet.
        workers: `data.workers` of the run.
    """
    return node_check(run_folder, Load.of_environment(workers))


def job_check(run_folder: Path, workers: int = 0, seconds: float = 60) -> list[Check]:
    """The same of every node of the Slurm job that this process belongs to, asked at once, and what comes out only between
    them: whether all answer, their clocks, one shared folder. Of this node alone where there is no job of several.

    Args:
        seconds: a node that has not answered by then is at fault.
    """
    try:
        hosts = job_hosts()
    except UserError as error:
        return [Check("nodes", "failure", str(error), "mend the job's environment", host_name())]
    return check_nodes(hosts, run_folder, workers, seconds) if len(hosts) > 1 else quick_check(run_folder, workers)


def submission_check(tracking: TrackingSettings, run_folder: Path, nodes: int) -> list[Check]:
    """What can be told on the login node before a job is submitted, besides what `check_config` finds: whether the run folder
    takes what a run writes and may be shared, and whether W&B is within reach.

    Args:
        nodes: that the job will have.
    """
    return run_checks([("versions", check_versions), ("run folder", lambda: check_run_folder(run_folder, QUICK_BYTES, nodes)),
                       ("W&B", lambda: _wandb(tracking))], NODE_SECONDS)


def full_check(run_folder: Path, config: Config | None) -> list[Check]:
    """Everything that one process can find out."""
    load = Load.of_environment(config.data.workers if config else 0)
    found = node_check(run_folder, load, SPEED_BYTES)
    found += run_checks([("torch", check_computing)], SOURCE_SECONDS)
    return found + run_checks(_reach(config), SOURCE_SECONDS)


def group_check(run_folder: Path, config: Config | None, quick: bool) -> list[Check]:
    """Everything that the processes of a group find out, each of itself and all of them together. Called by every process of
    it (RANK and the rest are set); rank 0 gets all checks, the others only what rank 0 cannot hear of."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what its sockets complain of is reported, without stacks
    from genscale.cluster.network_check import roll_call

    rank, world_size, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    own: list[Check] = []
    if local_rank == 0:
        load = Load.of_environment(config.data.workers if config else 0)
        own += node_check(run_folder, load, QUICK_BYTES if quick else SPEED_BYTES)
    answer, store = roll_call(rank, world_size, ROLL_CALL_SECONDS)
    if answer.state == "failure":
        return [*own, answer] if rank == 0 or answer.host == host_name() else []
    own += run_checks([("torch", lambda: check_computing(local_rank))], SOURCE_SECONDS)
    if config and local_rank == 0 and not quick:
        own += run_checks([("data", lambda: _data(config.data))], SOURCE_SECONDS)
    found = _together(run_folder, own, answer)
    del store  # until now it was where they met
    if rank == 0 and not quick:
        found += run_checks([("W&B", lambda: _wandb(config.tracking if config else None))], SOURCE_SECONDS)
    return found


def _together(run_folder: Path, own: list[Check], came: Check) -> list[Check]:
    from genscale.cluster.links import check_links
    from genscale.cluster.network_check import check_all_reduce, check_clocks, check_shared_folder
    from genscale.parallel.processes import Processes

    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective that fails is an error to report, not the end
    processes, at = None, "process group"
    try:
        processes = Processes(timeout_minutes=COLLECTIVE_MINUTES)
        at = "all-reduce"
        hosts = processes.gather(host_name())
        found = [check for checks in processes.gather(own) for check in checks]
        found += [*compare_versions(found), came]
        found += check_all_reduce(processes)
        found += check_links(processes, hosts)
        found += check_clocks(processes, hosts)
        found += check_shared_folder(processes, hosts, run_folder)
        return found if processes.is_main else []
    except RuntimeError as error:  # torch's: a peer that is gone, a collective that took too long
        return [*own, came, Check(at, "failure", _short(error), "look at the network between the nodes; NCCL_DEBUG=INFO and "
                                  "TORCH_DISTRIBUTED_DEBUG=INFO say more", host_name())]
    finally:
        if processes is not None:
            processes.close()


def _reach(config: Config | None) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    if config is None:
        return [("W&B", lambda: _wandb(None))]
    return [("data", lambda: _data(config.data)), ("W&B", lambda: _wandb(config.tracking))]


def _data(settings: DataSettings) -> Iterator[Check]:
    from genscale.data.reachability import reach

    try:
        for line in reach(settings):
            yield Check("data", "ok", line, host=host_name())
    except UserError as error:
        found, _, advice = str(error).rpartition("; ")
        yield Check("data", "failure", found or advice, advice if found else "mend the setting", host_name())


def _wandb(settings: TrackingSettings | None) -> Iterator[Check]:
    mode = settings.wandb if settings else "online"
    if mode == "disabled":
        yield Check("W&B", "ok", "disabled")
        return
    if mode == "offline":
        yield Check("W&B", "ok", "offline; `genscale sync RUN` uploads it, from a machine with internet")
        return
    from genscale.tracking.wandb_server import check_server

    try:
        yield Check("W&B", "ok", f"{check_server()} answers")
    except UserError as error:
        # Where no run is named, it may be one of those that do not mind: offline is the default.
        yield Check("W&B", "warning" if settings else "ok", str(error), "set tracking.wandb to offline, and `genscale sync "
                    "RUN` later where there is internet")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
