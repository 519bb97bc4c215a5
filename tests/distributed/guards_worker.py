"""What a process of a test of the guards does; see genscale/testing/workers.py: whole runs of the points family, from the data
to the checkpoints, on data with points that are no numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from genscale.data.lanes import Cursor, Sample
from genscale.errors import UserError
from genscale.families import family
from genscale.families.points.data import PointsData
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.testing.runs import train_in_group
from genscale.testing.workers import run_of, serve
from genscale.training import run as life
from genscale.training.trainer import Trainer

GLOBAL_BATCH = 8
SETTINGS = {
    "model.family": "points", "model.width": 16, "model.latent": 4, "data.lanes": GLOBAL_BATCH, "data.validation_points": 20,
    "train.global_batch_size": GLOBAL_BATCH, "train.steps": 12, "train.precision": "fp32", "train.log_every": 1,
    "train.checkpoint_every": 4, "train.checkpoint_keep": 9, "train.ema_half_life": 100, "train.ema_ramp_up": 0,
    "optimizer.lr": 0.01, "tracking.wandb": "disabled",
}  # fmt: skip


class PlantedPoints(PointsData):
    """With as many lanes as a global batch has samples, position k of every lane is global batch k.

    Attributes:
        bad: batches of which one sample is no number.
        absent: batches that the data does not have.
    """

    bad: frozenset[int] = frozenset()
    absent: frozenset[int] = frozenset()

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        for sample, after in super().open_lane(lane, cursor):
            batch = after["position"] - 1
            if batch not in self.absent:
                # Of rank 1's, where there are two processes.
                point = np.full_like(sample["point"], np.nan) if batch in self.bad and lane == 5 else sample["point"]
                yield {"point": point}, after


class WithoutPhases(Trainer):
    """Leaves updates out by not running their phase."""

    absent: frozenset[tuple[str, int]] = frozenset()

    def train_step(self, step: int, *arguments: Any) -> Any:
        phases = self.objective.phases
        self.objective.phases = [phase for phase in phases if (phase.name, step) not in self.absent]
        try:
            return super().train_step(step, *arguments)
        finally:
            self.objective.phases = phases


def tensors_of(checkpoint: Any) -> str:
    """A hash of all networks, optimizers and averages."""
    total = hashlib.sha256()
    for kind in ("networks", "optimizers", "averages"):
        for name in ("discriminator", "generator"):
            if kind == "averages" and not checkpoint.has_average(name):
                continue
            stored = checkpoint.tensors(kind, name)
            for key in sorted(stored.keys()):
                total.update(f"{kind}/{name}/{key}".encode())
                total.update(stored(key).reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    run = run_of(variant, processes)
    PlantedPoints.bad = frozenset(variant.get("bad", ()))
    PlantedPoints.absent = frozenset(variant.get("absent", ()))
    WithoutPhases.absent = frozenset((name, step) for name, step in variant.get("without", ()))
    life.Trainer = WithoutPhases if "without" in variant else Trainer
    error = None
    try:
        train_in_group(run.folder, {**SETTINGS, **variant["settings"]}, processes)
    except UserError as mistake:
        error = f"{type(mistake).__name__}: {mistake}"
    except SystemExit as end:  # another process speaks
        error = f"exit code {end.code}"
    errors = processes.gather(error)
    if not processes.is_main:
        return {}
    found = run.checkpoints()
    return {"errors": errors, "lines": run.lines(), "steps": [checkpoint.step for checkpoint in found],
            "digest": found[-1].digest() if found else None, "tensors": tensors_of(found[-1]) if found else None,
            "guards": found[-1].state()["guards"] if found else None}


if __name__ == "__main__":
    family("points").module().build_data = PlantedPoints
    serve(answer)
