"""What a partition has: a job that asks for more waits in the queue for ever, where Slurm is not told to refuse it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from genscale.cluster.gpus import gpus_in
from genscale.cluster.job import Job, seconds_of
from genscale.cluster.slurm_commands import ask
from genscale.errors import UserError


@dataclass(frozen=True)
class Node:
    """As sinfo shows it; `gres` in its own words."""

    name: str
    cpus: int
    gpus: int
    gres: str = field(default="", compare=False)

    def gpus_of(self, kind: str | None) -> int:
        return gpus_in(self.gres, kind) if kind else self.gpus


@dataclass(frozen=True)
class Partition:
    """As sinfo shows it; or several of which a job takes any. `time` is the longest limit, None for none."""

    name: str
    time: str | None
    nodes: tuple[Node, ...]


def find_partition(name: str | None) -> Partition | None:
    """That of the name (or those, with commas), or the cluster's default one; None where there is none, of which Slurm has its
    own words.

    Raises UserError where there is no Slurm."""
    chosen = ["--partition", name] if name else []
    done = ask("sinfo", "--noheader", "--Node", *chosen, "--format=%P|%N|%c|%G|%l")
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 4]
    rows = [row for row in rows if name or row[0].endswith("*")]  # the default one
    if done.returncode or not rows:
        return None
    nodes = {node.strip(): Node(node.strip(), int(re.sub(r"\D", "", cpus) or 0), gpus_in(gres), gres)
             for _, node, cpus, gres, _ in rows}  # of several partitions a node may be in each
    names = dict.fromkeys(row[0].strip().rstrip("*") for row in rows)
    limits = sorted({row[4].strip() for row in rows}, key=seconds_of)
    return Partition(",".join(names), limits[-1] if all(map(seconds_of, limits)) else None, tuple(nodes.values()))


def check_fits(job: Job, partition: Partition) -> None:
    """Raises UserError for more nodes, GPUs, cores or time than the partition has."""
    cores, kind = job.processes_per_node * job.cpus_per_process, job.gpus.kind
    gpus = f"{kind} GPUs" if kind else "GPUs"
    _check("--gpus-per-node", job.gpus_per_node, gpus, partition, lambda node: node.gpus_of(kind))
    _check("--cpus-per-process", cores, f"cores ({job.processes_per_node} x {job.cpus_per_process})", partition,
           lambda node: node.cpus)
    fitting = [node for node in partition.nodes if node.gpus_of(kind) >= job.gpus_per_node and node.cpus >= cores]
    if len(fitting) < job.nodes:
        raise UserError(f"--nodes: {job.nodes} is more than the {len(fitting)} nodes of partition {partition.name} that have "
                        f"{job.gpus_per_node} {gpus} and {cores} cores")
    if partition.time and seconds_of(job.time) > seconds_of(partition.time):
        raise UserError(f"--time: {job.time} is more than partition {partition.name} allows; nearest allowed: {partition.time}")


def _check(flag: str, wanted: int, what: str, partition: Partition, has: Callable[[Node], int]) -> None:
    most = max(map(has, partition.nodes))
    if wanted > most:
        raise UserError(f"{flag}: {wanted} {what} on a node, and no node of partition {partition.name} has more than {most}")
