"""What a job asks of Slurm, from the flags of `genscale slurm` and the site's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from genscale.cluster.site import Site, is_slurm_name
from genscale.errors import UserError

SHORTHANDS = {"seed": "run.seed"}
LARGEST_INDEX = 1000
"""Of an array's element, where a cluster has Slurm's own MaxArraySize."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass
class JobSettings:
    """A job of one run, or of an array of runs. What is left out is as the site's settings have it."""

    config: str = ""
    """YAML file of the run. Settings that override it stand after `--`, as in `genscale train`."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs of each, one a process; 0: train on the CPU (default: the site's)."""
    tasks_per_node: PositiveInt | None = None
    """Processes on each node (default: one a GPU, or one without GPUs)."""
    cpus_per_process: PositiveInt | None = None
    """CPU cores for each process, its loader workers included (default: the site's)."""
    time: str = "24:00:00"
    """Time limit of one life of the job, as [DAYS-]HOURS:MINUTES:SECONDS. The job requeues itself until the run is complete."""
    partition: str | None = None
    """Partition (default: the site's, or the cluster's own)."""
    account: str | None = None
    """Account (default: the site's, or the user's own)."""
    container: str | None = None
    """Image that Python runs in (default: the site's)."""
    array: str | None = None
    """One run for each value of a setting: seed=0-4, seed=0-9%2 (two at a time), or optimizer.lr=1e-3,3e-4."""
    launcher: Literal["accelerate", "srun"] = "accelerate"
    """accelerate: one task a node, which starts `accelerate launch`; srun: one task a process, without a launcher between."""
    lead: PositiveInt = 300
    """Seconds before the time limit at which the run is told to write a checkpoint and end (Slurm may be 30 s early)."""
    signal: Literal["USR1", "TERM", "INT"] = "USR1"
    """The signal that says so, where a library wants USR1 for itself."""
    max_requeues: NonNegativeInt = 100
    """How often the job may requeue itself."""
    site: str | None = None
    """The site's settings (default: ~/.config/genscale/site.yaml, or launch/site.yaml)."""


@dataclass(frozen=True)
class Array:
    """One run for each value of a setting.

    Attributes:
        key: of the config, as run.seed.
        short: its last part, which the names of the runs have before the value.
        at_once: most that run at a time; 0: any number.
    """

    key: str
    values: tuple[str, ...]
    at_once: int = 0

    @property
    def short(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def is_range(self) -> bool:
        """Whether the values are whole numbers in a row, and small enough, to be their own indices."""
        first = int(self.values[0]) if self.values[0].isdecimal() else 0
        row = range(first, first + len(self.values))
        return row[-1] <= LARGEST_INDEX and self.values == tuple(map(str, row))

    def indices(self) -> list[int]:
        """Slurm's numbers of the elements, in the order of the values."""
        return [int(value) for value in self.values] if self.is_range else list(range(len(self.values)))

    def for_sbatch(self) -> str:
        indices = self.indices()
        return f"{indices[0]}-{indices[-1]}" + (f"%{self.at_once}" if self.at_once else "")

    def name_of(self, name: str, value: str) -> str:
        """Of the run with that value, in an array called `name`."""
        return f"{name}-{self.short}{re.sub(r'[^A-Za-z0-9._+-]', '-', value)}"


@dataclass(frozen=True)
class Job:
    """A job with nothing left to decide."""

    name: str
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    cpus_per_process: int
    time: str
    partition: str | None
    account: str | None
    container: str | None
    array: Array | None
    launcher: str
    lead: int
    signal: str
    max_requeues: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


def settle(settings: JobSettings, site: Site, name: str) -> Job:
    """The job called `name`. Raises UserError for what cannot be asked of any Slurm."""
    gpus = site.gpus_per_node if settings.gpus_per_node is None else settings.gpus_per_node
    processes = settings.tasks_per_node or max(gpus, 1)
    if gpus and processes != gpus:
        raise UserError(f"--tasks-per-node: {processes} on {gpus} GPUs a node: there is one process a GPU; leave it out, or "
                        f"set --gpus-per-node to {processes} (0: train on the CPU)")
    seconds = seconds_of(settings.time)
    if not seconds:
        raise UserError(f"--time: '{settings.time}' is not a time limit; write [DAYS-]HOURS:MINUTES:SECONDS, as 24:00:00 or "
                        "2-00:00:00, or whole minutes")
    if settings.lead >= seconds:
        raise UserError(f"--lead: {settings.lead} s before the limit is before the job begins, with --time {settings.time}; "
                        f"nearest allowed: below {seconds} s, say {max(1, seconds // 3)}")
    for flag, value in (("partition", settings.partition), ("account", settings.account)):
        if value is not None and not is_slurm_name(value):
            raise UserError(f"--{flag}: '{value}' is not a name that Slurm could have")
    container = settings.container or site.container
    if container and not (re.fullmatch(r"[^'\"\\`]+", container) and container.isprintable()):
        raise UserError(f"--container: {container} is not a path that a job's script can hold (no quotes, no backslash)")
    return Job(name=name, nodes=settings.nodes, gpus_per_node=gpus, processes_per_node=processes,
               cpus_per_process=settings.cpus_per_process or site.cpus_per_process, time=settings.time,
               partition=settings.partition or site.partition, account=settings.account or site.account,
               container=container, array=_array(settings.array), launcher=settings.launcher,
               lead=settings.lead, signal=settings.signal, max_requeues=settings.max_requeues)


def seconds_of(time: str) -> int:
    """Of a time limit in one of Slurm's formats; 0 for what is none."""
    match = TIME.fullmatch(time)
    if match is None:
        return 0
    parts = [int(part) for part in match["parts"].split(":")]
    # Without days, one number is minutes and two are minutes and seconds; after days the first number is hours.
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return 86400 * int(match["days"] or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _array(text: str | None) -> Array | None:
    if text is None:
        return None
    match = re.fullmatch(r"(?P<key>[\w.]+)=(?P<values>.+?)(?:%(?P<at_once>\d+))?", text)
    if match is None:
        raise UserError(f"--array: '{text}' is not SETTING=VALUES, as seed=0-4 or optimizer.lr=1e-3,3e-4")
    key, values = SHORTHANDS.get(match["key"], match["key"]), match["values"].split(",")
    if span := re.fullmatch(r"(\d+)-(\d+)", match["values"]):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= 10_000:
            raise UserError(f"--array: {match['values']} is not a range of values, the lowest first, of at most 10,000")
        values = [str(number) for number in range(first, last + 1)]
    if "" in values or len(set(values)) < len(values):
        raise UserError(f"--array: '{text}' names a value twice, or none between two commas")
    if "." not in key or key in ("run.name", "run.dir", "run.resume"):
        raise UserError(f"--array: {key} is not a setting that runs of an array can differ in; as seed, or optimizer.lr")
    at_once = int(match["at_once"] or 0)
    if match["at_once"] and not at_once:
        raise UserError(f"--array: '{text}' lets none run at a time; write %1 or more")
    return Array(key, tuple(values), at_once)
