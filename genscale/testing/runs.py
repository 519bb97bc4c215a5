"""A look at what runs left: what was logged, in which order the samples came, what the checkpoints hold."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.families import FAMILIES
from genscale.parallel.processes import Processes, on_cpu
from genscale.parallel.strategies import plan_parallel
from genscale.settings.parser import parse_config
from genscale.supervise.signals import StopSignal
from genscale.supervise.supervision import Supervision
from genscale.testing import processes as apart
from genscale.tracking.metrics_file import read_metrics
from genscale.training import run as life
from genscale.training.setup import derive_accumulation

Settings = dict[str, Any]


def flags(settings: Settings) -> list[str]:
    """Settings by key as a command line has them."""
    return [f"--{key}={value}" for key, value in settings.items()]


@dataclass(frozen=True)
class Run:
    """A run by its folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from genscale.parallel.processes import Processes
        >>> from genscale.testing.runs import train_in_group
        >>> settings = {"model.family": "points", "train.steps": 4, "train.checkpoint_every": 2, "train.log_every": 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = train_in_group(Path(folder) / "run", {**settings, "tracking.wandb": "disabled"}, Processes())
        ...     cut = run.cut_after(2)
        ...     (len(run.lines()), cut.latest().step)
        (4, 2)
    """

    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """All that was logged, in its order; empty before the first line is there."""
        return read_metrics(self.folder / "metrics.jsonl")

    def lines(self) -> list[dict[str, Any]]:
        """What was logged of steps of training."""
        return [line for line in self.metrics() if "data_digest" in line]

    def values(self, *names: str) -> list[float]:
        """What was logged under these names, one name after the other."""
        return [line[name] for name in names for line in self.metrics() if name in line]

    def losses(self) -> list[float]:
        """The losses of its steps, of an objective of one phase."""
        return [line["loss"] for line in self.lines()]

    def order(self) -> list[int]:
        """The digest of all samples up to each step: equal lists are equal samples in equal order."""
        return [line["data_digest"] for line in self.lines()]

    def checkpoints(self) -> list[Checkpoint]:
        """Those of its folder, the earliest first."""
        return list_checkpoints(self.folder / "checkpoints")

    def checkpoint(self, step: int) -> Checkpoint:
        """That of a step."""
        return Checkpoint(self.folder / "checkpoints" / f"step-{step:08d}")

    def latest(self) -> Checkpoint:
        """The last one; IndexError where there is none."""
        return self.checkpoints()[-1]

    def digest(self) -> str:
        """That of the latest checkpoint: equal for equal weights, optimizers, averages, and place in the data."""
        return self.latest().digest()

    def cut_after(self, step: int, folder: Path | None = None) -> Run:
        """A copy, as a kill right after the checkpoint of `step` would leave the run.

        Args:
            folder: of the copy; without one, it lies beside the run as `<name>-cut`.
        """
        copy = Run(folder or self.folder.with_name(f"{self.folder.name}-cut"))
        shutil.copytree(self.folder, copy.folder)
        for checkpoint in copy.checkpoints():
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)
        return copy

    def resumed_from(self) -> list[str]:
        """Names of the checkpoints that its log says it continued from."""
        log = (self.folder / "logs" / "rank-00000.log").read_text()
        return [Path(path).name for path in re.findall(r"continuing from (.*?step-\d+)", log)]


def train(folder: Path, settings: Settings, processes: int = 1, **options: Any) -> Run:
    """Train in processes of their own, from nothing or from where the run is; on a CPU they are forked, see
    `genscale.testing.forks`.

    Args:
        folder: the run folder.
        settings: by key, without run.dir and run.name.
        processes: how many.
        options: see `genscale.testing.processes.run`.

    Raises:
        AssertionError: it failed, or hung.
    """
    words = flags({**settings, "run.dir": folder.parent, "run.name": folder.name})
    command: tuple[str, ...] = apart.GENSCALE
    if on_cpu():
        command = apart.group(processes, *apart.GENSCALE[1:])
    elif processes > 1:
        words += ["--processes", str(processes)]
    done = apart.run("train", *words, command=command, **options)
    assert done.code == 0, f"exit code {done.code}: genscale train {' '.join(words)}\n{done.out}\n{done.err[-5000:]}"
    return Run(folder)


def train_in_group(folder: Path, settings: Settings, processes: Processes) -> Run:
    """Train as one of the processes of a group that stands already, all of which call this; see `genscale.testing.workers`.
    To start a group takes longer than a small run.

    Args:
        folder, settings: see `train`.
        processes: of the group.
    """
    config = parse_config(FAMILIES, flags({**settings, "run.dir": folder.parent, "run.name": folder.name}))
    # The launcher is forgotten, and the group is no longer its own.
    alone = replace(config.parallel, shard_size=None, context=1)
    plan = replace(plan_parallel(alone, config.train.precision), world_size=processes.world_size,
                   shard_size=config.parallel.shard_size, context=config.parallel.context)
    processes.split_sequences(plan.context)
    config = plan.settled(config)
    with Supervision(config.guards.hang_minutes, folder, processes, StopSignal()) as supervision:
        accumulation = derive_accumulation(config.train, processes.world_size, plan.context)
        life._train(config, processes, plan, accumulation, folder, supervision)
    return Run(folder)
