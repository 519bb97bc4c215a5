"""What a process of a test of frozen networks does; see genscale/testing/workers.py: whole runs of a toy whose student learns a
teacher's answers where its own rollouts lead; their lengths, and so the forwards of a process, depend on the sample."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from genscale.data.lanes import Data
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.models.batch_norm import BatchNorm
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel import engine as engine_room
from genscale.parallel.averages import local
from genscale.parallel.engine import Engine
from genscale.parallel.pieces import tensor_bytes
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.rng import Draws
from genscale.settings.config import Config
from genscale.testing import toy
from genscale.testing.objectives import BareObjective, point
from genscale.testing.runs import Run, train_in_group
from genscale.testing.workers import run_of, serve
from genscale.training import run as life

GLOBAL_BATCH, WIDTH, STEPS = 8, 128, 6
SETTINGS = {
    "model.family": "toy", "data.lanes": GLOBAL_BATCH, "train.global_batch_size": GLOBAL_BATCH,
    "train.steps": STEPS, "train.precision": "fp32", "train.log_every": 1, "train.checkpoint_every": 3,
    "train.evaluate_every": 3, "train.sample_every": 6, "train.checkpoint_keep": 9, "train.ema_half_life": 100,
    "train.ema_ramp_up": 0, "optimizer.name": "sgd", "optimizer.lr": 0.02, "tracking.wandb": "disabled", "run.trace": True,
}  # fmt: skip


class Network(nn.Module):
    """Points to points. Its hidden layer is larger than what ZeRO-3 leaves whole, and a block of its own for FSDP2."""

    def __init__(self, teaches: bool) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        # Of a network that is not as in evaluation the answers would depend on the batch, and on chance.
        self.between = nn.Sequential(BatchNorm(WIDTH), nn.Dropout(0.5)) if teaches else nn.Identity()

    def blocks(self) -> list[nn.Module]:
        return [self.hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.between(self.hidden(torch.tanh(self.first(x))))))


class Distilled(BareObjective):
    """Trains `student` to answer as `teacher` does.

    Attributes:
        teacher_is_gone: nobody can give the teacher's weights any more, as of a run that was deleted.
        calls: forwards of each rollout of this process.
    """

    unit = "points"
    averaged = ("student",)
    frozen: Mapping[str, str] = {"teacher": "the school of Athens"}
    teacher_is_gone = False
    calls: list[int] = []

    def __init__(self) -> None:
        with torch.device("meta"):
            networks = {"student": Network(teaches=False), "teacher": Network(teaches=True)}
        super().__init__(networks, [Phase("student", "student", self.terms, self.count)])

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        if name == "teacher" and self.teacher_is_gone:
            raise UserError("the teacher is gone")
        with torch.random.fork_rng([]):
            torch.manual_seed(len(name))
            state = Network(name == "teacher").state_dict()
            if name == "teacher":
                state |= {f"between.0.{key}": torch.rand(WIDTH) + 0.5
                          for key in ("weight", "bias", "running_mean", "running_var")}
                state["last.weight"] *= 3
        return lambda key: state[key]

    def rollout(self, points: Tensor, lengths: Tensor) -> Tensor:
        """Where `(batch, 2)` the student leads points in so many steps `(batch,)`, the latter on the host."""
        calls = 0
        with self.generating("student") as rollout:
            while rollout.goes_on(bool((lengths > calls).any())):
                ended = (lengths <= calls)[:, None].to(points.device)
                points = torch.where(ended, points, rollout.network(points).float())
                calls += 1
        assert not points.requires_grad
        self.calls.append(calls)
        return points

    def terms(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        led = self.rollout(batch["x"], batch["sample"] % 5)
        with torch.no_grad():
            wanted = networks["teacher"](led)
        answer = networks["student"](led)
        # The gradient of the second goes through the teacher.
        return {"distance": (answer - wanted).float().square().sum(),
                "judged": 0.1 * (networks["teacher"](answer) - batch["x"]).float().square().sum()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        led = self.rollout(batch["x"], batch["sample"] % 3)
        return {"error": (networks["student"](led) - networks["teacher"](led)).float().square().sum(1)}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        gc.collect()  # with an engine that nobody holds would go what gathers its network
        return {"loss": totals["error"].mean().item()}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        return str(self.rollout(torch.zeros(1, 2, device=device), torch.tensor([2])).tolist())


def plant(objective: type[Objective] = Distilled) -> None:
    """The toy family, with another objective and other data."""

    def data(settings: toy.ToyDataSettings, seed: int) -> toy.ToyData:
        return toy.ToyData(point, settings.lanes)

    def build(config: Config, data: Data) -> Objective:
        return objective()

    module = SimpleNamespace(__name__="toy", build_data=data, validation=lambda *words: data(*words).validation(), build=build,
                             restore=build)
    FAMILIES.registered["toy"] = replace(toy.FAMILY, module=lambda: module, sampling=None)


def held_bytes(engine: Engine, name: str) -> int:
    """What this process holds of a network's parameters between steps."""
    parameters = list(engine.modules[name].parameters())
    zeros = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    shards = [tensor for parameter in zeros for tensor in (parameter.ds_tensor, parameter.ds_secondary_tensor)]
    return tensor_bytes([local(parameter.detach()) for parameter in parameters]) + tensor_bytes(shards)


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    """One run; `fits`: whether a gathered network may."""
    run = run_of(variant, processes)
    Distilled.teacher_is_gone = "again_from" in variant
    Distilled.calls = []
    made: list[Engine] = []

    def keep_engine(*arguments: Any) -> Engine:
        made.append(build_engine(*arguments))
        return made[0]

    life.build_engine = keep_engine
    kept, fits = engine_room.fits, variant.get("fits", True)
    engine_room.fits = lambda *arguments: fits and kept(*arguments)
    try:
        train_in_group(run.folder, {**SETTINGS, **variant["settings"]}, processes)
    finally:
        engine_room.fits = kept
    engine = made[0]
    engine.train_only(None)  # gives back what the last sample had gathered
    calls, bytes_held = processes.gather(Distilled.calls), processes.gather(held_bytes(engine, "teacher"))
    if not processes.is_main:
        return {}
    found = run.latest()
    return {"numbers": numbers(run), "digest": found.digest(), "frozen": found.state()["frozen"], "calls": calls,
            "bytes": bytes_held, "optimizers": list(engine.optimizers), "averages": list(engine.averages),
            "files": sorted(file.relative_to(found.path).as_posix() for file in found.path.rglob("*.safetensors"))}


def numbers(run: Run) -> list[float]:
    """What was logged of a run: losses, gradient norms and validation losses."""
    return run.values("loss", "grad_norm", "validation_loss")


if __name__ == "__main__":
    plant()
    serve(answer)
