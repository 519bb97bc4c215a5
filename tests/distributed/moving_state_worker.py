"""What a process of a test of layers with moving state does; see genscale/testing/workers.py.

Trains a small autoencoder with a codebook through Trainer.run, dry batch included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.models.moving_state import MovingState
from genscale.objectives.base import Batch, Networks, Phase, Terms
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.rng import Draws
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ParallelSettings, ScheduleSettings, TrainSettings
from genscale.testing.objectives import BareObjective, point
from genscale.testing.toy import ToyData
from genscale.testing.training import Training
from genscale.testing.workers import serve
from genscale.training.replicas import compare_replicas

GLOBAL_BATCH, WIDTH, CODES, SHARE = 12, 3, 5, 0.2
DEFAULTS = {"strategy": "ddp", "layer": "VectorQuantiser", "steps": 5, "accumulation": 1, "dry_batch": True, "resume_at": 0,
            "shard_size": None}


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


class Quantised(BareObjective):
    averaged = ("vae",)

    def __init__(self, layer: str) -> None:
        with torch.device("meta"):
            super().__init__({"vae": Autoencoder(layer)}, [Phase("vae", "vae", self.loss, self.count)])

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        made, distances = networks["vae"](batch["x"])
        return {"reconstruction": (made.float() - batch["x"]).square().sum(), "commitment": 0.25 * distances.sum()}


def training_of(variant: dict[str, Any], processes: Processes, plan: ParallelPlan, steps: int, resume: Any = None) -> Training:
    train = TrainSettings(steps=steps, global_batch_size=GLOBAL_BATCH, ema_half_life=30.0, clip=0.0,
                          micro_batch_size=GLOBAL_BATCH // processes.world_size // variant["accumulation"])
    config = Config(train=train, optimizer=OptimizerSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0),
                    schedule=ScheduleSettings(name="constant"), guards=GuardSettings(dry_batch=variant["dry_batch"]),
                    parallel=ParallelSettings(strategy=plan.strategy, shard_size=variant["shard_size"]))
    return Training(Quantised(variant["layer"]), ToyData(point, GLOBAL_BATCH), config, processes=processes, plan=plan,
                    resume=resume)


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    variant = {**DEFAULTS, **variant}
    try:
        training = training_of(variant, processes, plan, variant["resume_at"] or variant["steps"])
        training.run()
        if variant["resume_at"]:
            resumed = training_of(variant, processes, plan, variant["steps"], (training.state(), training.place()))
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


if __name__ == "__main__":
    serve(answer, DEFAULTS)
