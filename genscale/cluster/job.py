"""What a job asks of Slurm, from the flags of `genscale slurm` and the site's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt

from genscale.cluster.array import Array, read_array
from genscale.cluster.gpus import Gpus, read_gpus, with_count
from genscale.cluster.sbatch_options import NAMED, merge
from genscale.cluster.site import Site, is_slurm_name
from genscale.errors import UserError

LONGEST = "365-00:00:00"
"""The longest time limit of lives, where a partition has no limit of its own."""
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass
class JobSettings:
    """A job of one run, or of an array of runs. What is left out is as the site's settings have it."""

    config: str = ""
    """YAML file of the run. Settings that override it stand after `--`, as in `genscale train`."""
    nodes: PositiveInt = 1
    """Machines."""
    gpus_per_node: str | None = None
    """GPUs of each, one a process, also with their kind as a100:4; 0: train on the CPU (default: the site's)."""
    gres: str | None = None
    """The same for a Slurm that knows no --gpus-per-node, as gpu:h100:8 (default: the site's)."""
    gpus_per_task: PositiveInt | None = None
    """1, with the srun launcher: each process is given its own GPU, and sees no other (default: it sees all of its node's)."""
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
    array: list[str] = field(default_factory=list)
    """One run for each value of a setting: seed=0-4, optimizer.lr=1e-3,3e-4, or optimizer.lr=@FILE (a value on each line); with
    %2 at the end two at a time. Several make a grid."""
    launcher: Literal["accelerate", "srun"] = "accelerate"
    """accelerate: one task a node, which starts `accelerate launch`; srun: one task a process, without a launcher between."""
    lead: PositiveInt = 300
    """Seconds before the time limit at which the run is told to write a checkpoint and end (Slurm may be 30 s early)."""
    signal: Literal["USR1", "TERM", "INT"] = "USR1"
    """The signal that says so, where a library wants USR1 for itself."""
    max_requeues: NonNegativeInt = 100
    """How often the job may requeue itself."""
    sbatch: list[str] = field(default_factory=list)
    """Any other option of sbatch, as --sbatch=--nice=100; may be repeated."""
    qos: str | None = None
    """Quality of service, as these that follow are of sbatch."""
    reservation: str | None = None
    """Reservation to run in."""
    constraint: str | None = None
    """Features that the nodes must have, as 'h100&ib'."""
    exclude: str | None = None
    """Nodes not to be given, as node[3-4]."""
    nodelist: str | None = None
    """Nodes to be given."""
    mem: str | None = None
    """Memory of each node, as 200G; 0: all of it."""
    exclusive: bool = False
    """No other job on the nodes."""
    mail_type: str | None = None
    """When to send mail, as END,FAIL."""
    mail_user: str | None = None
    """Whom to."""
    comment: str | None = None
    """A text that Slurm keeps with the job."""
    begin: str | None = None
    """Earliest start, as now+2hours or 2030-01-31T08:00."""
    dependency: str | None = None
    """Jobs to wait for, as sbatch takes them: afterok:1234."""
    after: list[str] = field(default_factory=list)
    """A run to wait for until it is complete; may be repeated."""
    site: str | None = None
    """The site's settings (default: ~/.config/genscale/site.yaml, or launch/site.yaml)."""


@dataclass(frozen=True)
class Job:
    """A job with nothing left to decide.

    Attributes:
        gpus_per_task: whether each process sees its own GPU only.
        options: further ones of sbatch.
    """

    name: str
    nodes: int
    gpus: Gpus
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
    gpus_per_task: bool = False
    options: tuple[str, ...] = ()

    @property
    def gpus_per_node(self) -> int:
        return self.gpus.count

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


def settle(settings: JobSettings, site: Site, name: str) -> Job:
    """The job called `name`. Raises UserError for what cannot be asked of any Slurm."""
    gpus = _gpus(settings, site)
    processes = settings.tasks_per_node or max(gpus.count, 1)
    if gpus.count and processes != gpus.count:
        raise UserError(f"--tasks-per-node: {processes} on {gpus.count} GPUs a node: there is one process a GPU; leave it out, "
                        f"or set --gpus-per-node to {processes} (0: train on the CPU)")
    if settings.gpus_per_task and (settings.gpus_per_task != 1 or settings.launcher != "srun" or not gpus.count):
        raise UserError(f"--gpus-per-task: {settings.gpus_per_task} with --launcher {settings.launcher} on {gpus.count} GPUs a "
                        "node: a process has one GPU, and only srun starts one task a process; nearest allowed: "
                        "--gpus-per-task 1 --launcher srun")
    seconds = seconds_of(settings.time)
    if not seconds:
        raise UserError(no_time_limit(settings.time, None))
    if settings.lead >= seconds:
        raise UserError(f"--lead: {settings.lead} s before the limit is before the job begins, with --time {settings.time}; "
                        f"nearest allowed: below {seconds} s, say {max(1, seconds // 3)}")
    for flag, value in (("partition", settings.partition), ("account", settings.account)):
        if value is not None and not is_slurm_name(value):
            raise UserError(f"--{flag}: '{value}' is not a name that Slurm could have")
    container = settings.container or site.container
    if container and not (re.fullmatch(r"[^'\"\\`]+", container) and container.isprintable()):
        raise UserError(f"--container: {container} is not a path that a job's script can hold (no quotes, no backslash)")
    return Job(name=name, nodes=settings.nodes, gpus=gpus, processes_per_node=processes,
               cpus_per_process=settings.cpus_per_process or site.cpus_per_process, time=settings.time,
               partition=settings.partition or site.partition, account=settings.account or site.account,
               container=container, array=read_array(settings.array), launcher=settings.launcher,
               lead=settings.lead, signal=settings.signal, max_requeues=settings.max_requeues,
               gpus_per_task=settings.gpus_per_task is not None, options=_options(settings, site))


def _gpus(settings: JobSettings, site: Site) -> Gpus:
    """The flags' GPUs, or else the site's."""
    if settings.gres is not None:
        if settings.gpus_per_node is not None:
            raise UserError(f"--gres: {settings.gres} says how many GPUs a node has; leave out --gpus-per-node")
        return read_gpus(None, settings.gres)
    own = read_gpus(site.gpus_per_node, site.gres, "site.gpus_per_node", "site.gres")
    if settings.gpus_per_node is None:
        return own
    asked = read_gpus(settings.gpus_per_node, None)
    return with_count(own, asked.count, asked.kind)


def _options(settings: JobSettings, site: Site) -> tuple[str, ...]:
    values = {name.replace("_", "-"): getattr(settings, name) for name in NAMED}
    named: dict[str, str | None] = {name: value for name, value in values.items() if value is not None}
    for name, value in named.items():
        if not value or not value.isprintable():
            raise UserError(f"--{name}: '{value}' is nothing that sbatch could be told")
    if settings.exclusive:
        named["exclusive"] = None
    return tuple(merge(site.sbatch, settings.sbatch, named))


def is_unlimited(time: str) -> bool:
    """Whether Slurm would take it for no limit at all."""
    return time.upper() in ("UNLIMITED", "INFINITE", "-1") or (TIME.fullmatch(time) is not None and not seconds_of(time))


def no_time_limit(time: str, longest: str | None) -> str:
    """What is wrong with it. A run must know when its life ends, for its checkpoint to be written before."""
    nearest = f"; nearest allowed: {longest or LONGEST}" if is_unlimited(time) else ""
    return (f"--time: '{time}' is not a time limit; write [DAYS-]HOURS:MINUTES:SECONDS, as 24:00:00 or 2-00:00:00, or whole "
            f"minutes{nearest}")


def seconds_of(time: str) -> int:
    """The seconds of a time limit in one of Slurm's formats; 0 for what is none."""
    match = TIME.fullmatch(time)
    if match is None:
        return 0
    parts = [int(part) for part in match["parts"].split(":")]
    # Without days, one number is minutes and two are minutes and seconds; after days the first number is hours.
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return 86400 * int(match["days"] or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))
