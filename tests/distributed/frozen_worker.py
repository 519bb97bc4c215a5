"""One process of a test of frozen networks, started by torchrun: whole runs of a toy that is planted in the place of the points
family. A student learns a teacher's answers where its own rollouts lead; their lengths, and so the forwards of a process,
depend on the sample. Writes what came of several runs as JSON."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.data.lanes import Data
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.models.batch_norm import BatchNorm
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel import engine as engine_room
from genscale.parallel.averages import local
from genscale.parallel.engine import Engine
from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.pieces import tensor_bytes
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.rng import Draws
from genscale.settings.config import Config
from genscale.settings.parser import parse_config
from genscale.supervise.signals import StopSignal
from genscale.supervise.supervision import Supervision
from genscale.tracking.metrics_file import read_metrics
from genscale.training import run as life

GLOBAL_BATCH, WIDTH, STEPS = 8, 128, 6
SETTINGS = {
    "model.family": "points", "data.lanes": GLOBAL_BATCH, "data.validation_points": 20, "train.global_batch_size": GLOBAL_BATCH,
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


class Distilled(Objective):
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
            self.networks = {"student": Network(teaches=False), "teacher": Network(teaches=True)}
        self.phases = [Phase("student", "student", self.terms, lambda batch: len(batch["point"]))]

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
        led = self.rollout(batch["point"], batch["sample"] % 5)
        with torch.no_grad():
            wanted = networks["teacher"](led)
        answer = networks["student"](led)
        # The gradient of the second goes through the teacher.
        return {"distance": (answer - wanted).float().square().sum(),
                "judged": 0.1 * (networks["teacher"](answer) - batch["point"]).float().square().sum()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        led = self.rollout(batch["point"], batch["sample"] % 3)
        return {"error": (networks["student"](led) - networks["teacher"](led)).float().square().sum(1)}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        gc.collect()  # with an engine that nobody holds would go what gathers its network
        return {"loss": totals["error"].mean().item()}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        return str(self.rollout(torch.zeros(1, 2, device=device), torch.tensor([2])).tolist())


def plant(objective: type[Objective] = Distilled) -> None:
    """The toy in the place of the points family."""
    points = FAMILIES["points"]
    functions: Any = points.module()

    def build(config: Config, data: Data) -> Objective:
        return objective()

    module = SimpleNamespace(__name__="toy", build_data=functions.build_data, validation=functions.validation, build=build,
                             restore=build)
    FAMILIES.registered["points"] = replace(points, module=lambda: module, sampling=None)


def held_bytes(engine: Engine, name: str) -> int:
    """What this process holds of a network's parameters between steps."""
    parameters = list(engine.modules[name].parameters())
    shards = [parameter.ds_tensor for parameter in parameters if hasattr(parameter, "ds_tensor")]
    return tensor_bytes([local(parameter.detach()) for parameter in parameters]) + tensor_bytes(shards)


def run(folder: Path, variant: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """One run; `again_from`: a copy of that run, cut after a checkpoint, goes on; `fits`: whether a gathered network may."""
    folder = folder / variant["name"]
    if processes.is_main and "again_from" in variant:
        name, step = variant["again_from"]
        shutil.copytree(folder.with_name(name), folder)
        for checkpoint in list_checkpoints(folder / "checkpoints"):
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)
    settings = {**SETTINGS, "run.dir": str(folder.parent), "run.name": folder.name, **variant.get("settings", {})}
    config = parse_config(FAMILIES, [f"--{key}={value}" for key, value in settings.items()], description="")
    Distilled.teacher_is_gone = "again_from" in variant
    Distilled.calls = []
    made: list[Engine] = []

    def keep_engine(*arguments: Any) -> Engine:
        made.append(build_engine(*arguments))
        return made[0]

    life.build_engine = keep_engine
    kept, fits = engine_room.fits, variant.get("fits", True)
    engine_room.fits = lambda *arguments: fits and kept(*arguments)
    plan = plan_parallel(replace(config.parallel, shard_size=None), config.train.precision)  # the launcher is forgotten
    plan = replace(plan, world_size=processes.world_size, shard_size=config.parallel.shard_size)
    try:
        with Supervision(config.guards.hang_minutes, folder, processes, StopSignal()) as supervision:
            accumulation = life.derive_accumulation(config.train, processes.world_size)
            life._train(config, processes, plan, accumulation, folder, supervision)
    finally:
        engine_room.fits = kept
    engine = made[0]
    engine.train_only(None)  # gives back what the last sample had gathered
    calls, bytes_held = processes.gather(Distilled.calls), processes.gather(held_bytes(engine, "teacher"))
    if not processes.is_main:
        return {}
    found = list_checkpoints(folder / "checkpoints")[-1]
    lines = list(read_metrics(folder / "metrics.jsonl"))
    return {"numbers": numbers(lines), "digest": found.digest(), "frozen": found.state()["frozen"], "calls": calls,
            "bytes": bytes_held, "optimizers": list(engine.optimizers), "averages": list(engine.averages),
            "files": sorted(file.relative_to(found.path).as_posix() for file in found.path.rglob("*.safetensors"))}


def numbers(lines: list[dict[str, Any]]) -> list[float]:
    """What was logged of a run: losses, gradient norms and validation losses."""
    return [line[key] for key in ("loss", "grad_norm", "validation_loss") for line in lines if key in line]


def main(variants: list[dict[str, Any]], folder: Path) -> None:
    plant()
    clear_launch_environment()
    processes = Processes(need_group=True)
    results = {variant["name"]: run(folder, variant, processes) for variant in variants}
    if processes.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    run_and_leave(lambda: main(json.loads(sys.argv[1]), Path(sys.argv[2])))
