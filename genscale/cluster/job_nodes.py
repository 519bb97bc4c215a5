"""Every node of a Slurm job, asked at once through srun: what a batch script knows before it starts anything on them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from genscale.cluster.checks import Check, count_of, host_name
from genscale.cluster.clocks import judge_clocks
from genscale.cluster.environment import clean_environment
from genscale.cluster.shared_folder import answers, clear_token, judge, leave_token
from genscale.cluster.storage_checks import existing
from genscale.errors import UserError

ENDING_SECONDS = 5.0
"""For srun to end what it has started."""
ARRIVAL_SECONDS = 1.0
"""How late srun may hand on a line."""


@dataclass
class _Answers:
    """What the nodes have said so far, and what srun has. A node that has said whether it `sees` has said all."""

    offsets: dict[str, float] = field(default_factory=dict)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    sees: dict[str, bool] = field(default_factory=dict)
    complaints: str = ""
    in_time: bool = True

    def take(self, line: str) -> None:
        """A line of a node."""
        arrived = time.time()
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line of the site's own greeting
            said = json.loads(line)
            host = said["host"]
            if "clock" in said:
                self.offsets[host] = said["clock"] - arrived
            elif "check" in said:
                self.checks.setdefault(host, []).append(Check.from_dict(said["check"]))
            else:
                self.sees[host] = said["sees"]

    def complain(self, line: str) -> None:
        """A line of srun's."""
        if "lacks support for cpu binding" not in line:  # where there is none, none is needed
            self.complaints += line


def job_hosts() -> list[str]:
    """The nodes of the Slurm job that this process belongs to; empty where it belongs to none.

    Raises:
        UserError: Slurm's own tool does not say. (To go on with this node alone would start another run than the one meant.)
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        asked = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=30, check=True,
                               env=clean_environment())
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}: `scontrol show hostnames` does not work here ({error}); put Slurm's "
                        "commands on the PATH of the job") from None
    return asked.stdout.split()


def check_nodes(hosts: Sequence[str], run_folder: Path, workers: int, seconds: float) -> list[Check]:
    """What each node finds of itself, and what comes out only between them: missing ones, clocks, one shared folder.

    Args:
        hosts: nodes of the job, as Slurm has them.
        seconds: a node that has not answered by then is at fault.
    """
    folder = existing(run_folder)
    try:
        token = leave_token(folder)
    except OSError as error:
        return [Check("run folder", "failure", f"{folder} cannot be written ({error.strerror})", "set run.dir to a folder that "
                      "can be, or free some space", host_name())]
    try:
        said = _ask(hosts, [sys.executable, "-m", "genscale.cluster.node_report", str(run_folder), str(folder), token,
                            str(seconds / 6), str(workers)], seconds)
        found = [check for host in hosts for check in said.checks.get(host, ())]
        found += compare_nodes(said.checks, said.offsets)
        found += _missing(hosts, said, seconds)
        if len(said.sees) > 1:
            found_it = {host for host, sees in said.sees.items() if sees}
            found += judge(folder, host_name(), said.sees, answers(folder, token, found_it))
        return found
    finally:
        clear_token(folder, token)


def compare_nodes(checks: Mapping[str, Sequence[Check]], offsets: Mapping[str, float]) -> list[Check]:
    """What comes out only between the nodes of a job: other versions, another time.

    Args:
        checks: by node.
        offsets: of each node's clock from any common one, seconds.
    """
    clocks = [judge_clocks(offsets, ARRIVAL_SECONDS)] if len(offsets) > 1 else []
    return compare_versions([check for each in checks.values() for check in each]) + clocks


def compare_versions(checks: Sequence[Check]) -> list[Check]:
    """A failure for each node whose versions are not those of most others."""
    found = {check.host: check.found for check in checks if check.name == "versions"}
    usual = max(found.values(), key=[*found.values()].count, default="")
    return [Check("versions", "failure", f"{versions}: not those of the other nodes", "give every node the same environment",
                  host, of_node=True) for host, versions in found.items() if versions != usual]


def _ask(hosts: Sequence[str], command: Sequence[str], seconds: float) -> _Answers:
    count, said = str(len(hosts)), _Answers()
    # A step beside whatever else the job runs, on all cores of each node; a node that fails must not silence the others.
    srun = ["srun", "--job-name=doctor", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap",
            "--cpu-bind=none", "--mpi=none", "--input=none", "--kill-on-bad-exit=0", "--wait=0", "--mem=0", "--export=ALL"]
    own = {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK") if name in os.environ}
    process = subprocess.Popen([*srun, *command], text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, env=clean_environment(**own))
    readers = [threading.Thread(target=_each_line, args=(process.stdout, said.take), daemon=True),
               threading.Thread(target=_each_line, args=(process.stderr, said.complain), daemon=True)]
    for reader in readers:
        reader.start()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        said.in_time = False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(ENDING_SECONDS)
    for reader in readers:
        reader.join(ENDING_SECONDS)
    return said


def _each_line(stream: IO[str], take: Callable[[str], None]) -> None:
    for line in stream:
        take(line)


def _missing(hosts: Sequence[str], said: _Answers, seconds: float) -> list[Check]:
    silent = [host for host in hosts if host not in said.sees]
    if not silent:
        return [Check("nodes", "ok", f"{count_of(len(hosts), 'node')} answered")]
    reason = " ".join(said.complaints.split())[-300:]
    late = "" if said.in_time else f" within {seconds:.0f} s"
    if len(silent) == len(hosts):
        # Nobody could speak: whose fault it is only srun can say.
        silent = [host for host in hosts if re.search(rf"\bon (?:node )?{re.escape(host)}\b", said.complaints)]
        if not silent:
            return [Check("nodes", "failure", f"no node answered{late}: {reason or 'srun said nothing'}",
                          "see what `srun --overlap hostname` says in this job")]
    return [Check("nodes", "failure", f"{host} did not answer{late}" + (f" ({reason})" if reason else ""), "leave the node out "
                  "(--exclude), and have it looked at", host, of_node=True) for host in silent]
