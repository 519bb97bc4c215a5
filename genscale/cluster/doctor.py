"""What `genscale doctor` looks at: the quick part that every job begins with, and the rest."""

from __future__ import annotations

from pathlib import Path

from genscale.cluster.checks import Check, run_checks
from genscale.cluster.device_checks import check_driver
from genscale.cluster.node_checks import (
    Load,
    check_cores,
    check_extension_builds,
    check_limits,
    check_shared_memory,
    check_versions,
)
from genscale.cluster.storage_checks import QUICK_BYTES, check_run_folder

NODE_SECONDS = 30.0
"""Longest wait for what a sound node answers within one."""


def node_check(run_folder: Path, load: Load) -> list[Check]:
    """What can be told of this node in a few seconds, without loading torch."""
    return run_checks([
        ("versions", check_versions),
        ("GPUs", check_driver),
        ("CPU cores", lambda: check_cores(load)),
        ("open files", lambda: check_limits(load)),
        ("shared memory", lambda: check_shared_memory(load)),
        ("extension builds", check_extension_builds),
        ("disk space", lambda: check_run_folder(run_folder, QUICK_BYTES)),
    ], NODE_SECONDS)


def quick_check(run_folder: Path, workers: int = 0) -> list[Check]:
    """The beginning of a job: every node of it, within a minute, before anything is started on them.

    To be called once, by the batch script's process. Never raises: what goes wrong is a failure in the list. `bad_nodes` of it
    names the nodes not to be given again.

    Args:
        run_folder: the run's; it need not be there yet.
        workers: `data.workers` of the run.
    """
    return node_check(run_folder, Load.of_environment(workers))
