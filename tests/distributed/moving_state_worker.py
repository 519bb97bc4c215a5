"""One process of a test of layers with moving state, started by torchrun as engine_worker.py is.

Trains a small autoencoder with a codebook through Trainer.run, dry batch included, and writes what came of it by torch.save.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.errors import UserError
from genscale.hook import Hook, StepReport
from genscale.models.image_layers import InitialWeights
from genscale.models.moving_state import MovingState
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine, plan_parallel
from genscale.rng import Draws
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ParallelSettings, ScheduleSettings, TrainSettings
from genscale.training.optimizers import make_optimizer
from genscale.training.replicas import compare_replicas
from genscale.training.trainer import Trainer

GLOBAL_BATCH, WIDTH, CODES, SHARE = 12, 3, 5, 0.2
DEFAULTS = {"strategy": "ddp", "layer": "VectorQuantiser", "steps": 5, "accumulation": 1, "dry_batch": True, "resume_at": 0,
            "shard_size": None}


class Points(Data):
    """Sample g is a point in the plane that only g decides."""

    lane_count = GLOBAL_BATCH

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        position = 0 if cursor is None else cursor["position"]
        while True:
            g = position * self.lane_count + lane
            yield {"x": np.array([np.sin(g), np.cos(2 * g)], np.float32)}, {"position": position + 1}
            position += 1

    def validation(self) -> list[Sample]:
        return []

    def check(self, global_batch_size: int) -> None: ...

    def plan(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class Tutorial(nn.Module):
    """The codebook as tutorials have it (van den Oord et al. 2017, appendix A): in training, every forward moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(CODES, WIDTH))
        self.register_buffer("uses", torch.empty(CODES))
        self.register_buffer("totals", torch.empty(CODES, WIDTH))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codes)
        nn.init.ones_(self.uses)
        self.totals.copy_(self.codes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `(batch, width)` with the gradient of `x`, and the squared distances to them `(batch,)`, which pull `x`."""
        wide = x.float()
        nearest = torch.cdist(wide.detach(), self.codes).argmin(1)
        codes = self.codes[nearest]
        if self.training:
            chosen = nn.functional.one_hot(nearest, CODES).float()
            self.add(torch.cat([chosen.sum(0)[:, None], chosen.T @ wide.detach()], 1))
        return x + (codes - wide).detach().to(x.dtype), (wide - codes).square().sum(1)

    def add(self, sums: Tensor) -> None:
        """Of each code: its uses, and the sum of what it was used for, `(codes, 1 + width)`."""
        self.move(sums)

    @torch.no_grad()
    def move(self, sums: Tensor) -> None:
        self.uses.lerp_(sums[:, 0], SHARE)
        self.totals.lerp_(sums[:, 1:], SHARE)
        self.codes.copy_(self.totals / self.uses.clamp(min=1e-5)[:, None])


class VectorQuantiser(Tutorial, MovingState):
    """The same, declared: once an update, by the sums over the whole batch."""

    moving = {"codes": "averaged", "uses": "copied", "totals": "copied"}

    def begin_update(self) -> None:
        self.sums = torch.zeros(CODES, 1 + WIDTH, device=self.uses.device)

    def add(self, sums: Tensor) -> None:
        if self.moves:
            self.sums += sums

    def end_update(self) -> None:
        self.move(self.sum_over_processes(self.sums))


class Unsummed(VectorQuantiser):
    """Says that it moves, and forgets the other processes."""

    def end_update(self) -> None:
        self.move(self.sums)


class Replacing(VectorQuantiser):
    """Another tensor takes the buffer's place."""

    def move(self, sums: Tensor) -> None:
        super().move(sums)
        self.uses = self.uses.clone()


class Constant(Tutorial):
    """Nothing moves: a table."""

    def add(self, sums: Tensor) -> None:
        pass


class Normalised(Constant):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(x))


LAYERS = {layer.__name__: layer for layer in (Tutorial, VectorQuantiser, Unsummed, Replacing, Constant, Normalised)}


class Autoencoder(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.encoder, self.quantiser, self.decoder = nn.Linear(2, WIDTH), LAYERS[layer](), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, distances = self.quantiser(self.encoder(x))
        return self.decoder(codes), distances


class Quantised(Objective):
    averaged = ("vae",)

    def __init__(self, layer: str) -> None:
        with torch.device("meta"):
            self.networks = {"vae": Autoencoder(layer)}
        self.weights = InitialWeights(self.networks["vae"], 0)
        self.phases = [Phase("vae", "vae", self.loss, lambda batch: len(batch["x"]))]

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        made, distances = networks["vae"](batch["x"])
        return {"reconstruction": (made.float() - batch["x"]).square().sum(), "commitment": 0.25 * distances.sum()}

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        return self.weights

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        raise NotImplementedError

    def summarise(self, totals: Any) -> dict[str, float]:
        raise NotImplementedError

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        raise NotImplementedError


class Note(Hook):
    """Takes down the loss of every step."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def step(self, report: StepReport) -> None:
        self.losses.append(report.metrics["loss"])


class Training:
    """A trainer over an engine of its own, from initial weights or from what another one `saved`."""

    def __init__(self, variant: dict[str, Any], processes: Processes, plan: ParallelPlan, steps: int,
                 saved: dict[str, Any] | None = None) -> None:
        self.processes = processes
        config = Config(train=TrainSettings(steps=steps, global_batch_size=GLOBAL_BATCH, ema_half_life=30.0),
                        optimizer=OptimizerSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0),
                        schedule=ScheduleSettings(name="constant"), guards=GuardSettings(dry_batch=variant["dry_batch"]))
        objective = Quantised(variant["layer"])
        micro = GLOBAL_BATCH // processes.world_size // variant["accumulation"]
        settings = ParallelSettings(strategy=plan.strategy, shard_size=variant["shard_size"])
        self.engine = build_engine(plan, processes, settings, "fp32", 0.0, micro, variant["accumulation"])
        read = saved["vae"].__getitem__ if saved else objective.weights
        self.engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer), {"vae": read}, ["vae"])
        if saved:
            self.engine.load_optimizer_state("vae", saved["optimizer"], saved["optimizer"].__getitem__)
            self.engine.load_average_state("vae", saved["average"], saved["average"].__getitem__)
        self.loader = StepLoader(Points(), global_batch_size=GLOBAL_BATCH, micro_batch_size=micro, rank=processes.rank,
                                 world_size=processes.world_size, workers=0, prefetch_steps=1,
                                 state=saved["data"] if saved else None)
        self.losses: list[float] = []
        self.trainer = Trainer(config, objective, self.engine, self.loader, [Note(self.losses)], last_good=lambda: "none")

    def run(self, first: int) -> None:
        try:
            self.trainer.run(first)
        finally:
            self.loader.close()

    def state(self) -> dict[str, Any]:
        return {"vae": {name: tensor.clone() for name, tensor in self.engine.network_state("vae")},
                "optimizer": self.whole(self.engine.optimizer_pieces("vae")),
                "average": self.whole(self.engine.average_pieces("vae")),
                "data": merge_states(self.processes.gather(self.loader.state()), GLOBAL_BATCH)}

    def whole(self, pieces: list[Any]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for piece in (piece for of_process in self.processes.gather(pieces) for piece in of_process):
            tensor = made.setdefault(piece.name, torch.zeros(piece.shape, dtype=piece.values.dtype))
            tensor.view(-1)[piece.first:piece.first + piece.values.numel()] = piece.values.reshape(-1)
        return made


def run_variant(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    variant = {**DEFAULTS, **variant}
    try:
        training = Training(variant, processes, plan, variant["resume_at"] or variant["steps"])
        training.run(1)
        if variant["resume_at"]:
            resumed = Training(variant, processes, plan, variant["steps"], training.state())
            resumed.run(variant["resume_at"] + 1)
            resumed.losses = training.losses + resumed.losses
            training = resumed
    except UserError as error:
        return {"refused": processes.gather(str(error)), "losses": training.losses}
    try:
        compare_replicas(training.engine)
        apart = ""
    except UserError as error:
        apart = str(error)
    return {"losses": training.losses, "apart": processes.gather(apart), **training.state()}


def main(variants: dict[str, dict[str, Any]], out: Path) -> None:
    plans = {name: plan_parallel(ParallelSettings(strategy={**DEFAULTS, **it}["strategy"]), "fp32", "sgd")
             for name, it in variants.items()}
    clear_launch_environment()
    processes = Processes(need_group=True)
    results = {name: run_variant(variant, processes, plans[name]) for name, variant in variants.items()}
    if processes.is_main:
        torch.save(results, out)
    processes.close()


if __name__ == "__main__":
    run_and_leave(lambda: main(json.loads(sys.argv[1]), Path(sys.argv[2])))
