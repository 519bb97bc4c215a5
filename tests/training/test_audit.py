"""The audit against faults that were planted, one of each kind, and against gradients taken by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.loader import StepLoader
from genscale.hook import Hook
from genscale.inspection.audit import AuditedTrainer
from genscale.inspection.audit_probe import repeated
from genscale.inspection.audit_report import AuditReport
from genscale.models.image_layers import spectral_norm
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel.processes import Processes
from genscale.parallel.replicated import ReplicatedEngine
from genscale.rng import Draws
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings, ScheduleSettings, TrainSettings
from genscale.training.optimizers import make_optimizer
from genscale.training.trainer import Trainer

GLOBAL, STEPS, NOISE = 6, 3, 3


class Points(Data):
    """Sample g is a point in the plane that only g decides; a broken one has the lanes in pairs."""

    lane_count = 6

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        position = 0 if cursor is None else cursor["position"]
        while True:
            g = position * self.lane_count + (lane // 2 if self.broken else lane)
            yield {"x": np.array([math.sin(g), math.cos(2 * g)], np.float32)}, {"position": position + 1}
            position += 1

    def validation(self) -> list[Sample]:
        return []

    def check(self, global_batch_size: int) -> None: ...

    def plan(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


class Adversaries(Objective):
    """A small GAN with a regulariser every eighth step, and room for faults: `plant` is called in the generator's phase."""

    def __init__(self, plant: Callable[[Networks, Terms], None] | None = None) -> None:
        torch.manual_seed(0)
        self.networks = {"generator": nn.Sequential(nn.Linear(NOISE, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)),
                         "discriminator": nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))}
        self.phases = [
            Phase("discriminate", "discriminator", self.discriminate, self.count, repeats=2, statistics=frozenset({"logit"})),
            Phase("regularise", "discriminator", self.regularise, self.count, every=8),
            Phase("generate", "generator", self.generate, self.count),
        ]
        self.plant = plant

    def count(self, batch: Batch) -> int:
        return len(batch["sample"])

    def discriminate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        networks["generator"].eval()  # a frozen network's statistics must not move
        real, fake = (networks["discriminator"](x) for x in (batch["x"], networks["generator"](draws.normal("z", NOISE))))
        return {"real": F.softplus(-real).sum(), "fake": F.softplus(fake).sum(), "logit": real.detach().sum()}

    def regularise(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        return {"penalty": networks["discriminator"](batch["x"]).square().sum()}

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        networks["discriminator"].eval()
        made = networks["generator"](draws.normal("z", NOISE))
        terms = {"fool": F.softplus(-networks["discriminator"](made)).sum(), "size": 0.1 * made.square().sum()}
        if self.plant is not None:
            self.plant(networks, terms)
        return terms

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        raise NotImplementedError

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        raise NotImplementedError

    def summarise(self, totals: Any) -> dict[str, float]:
        raise NotImplementedError

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        raise NotImplementedError


CONFIG = Config(train=TrainSettings(steps=STEPS, global_batch_size=GLOBAL, clip=0.5),
                optimizer=OptimizerSettings(lr=1e-2), schedule=ScheduleSettings(name="constant"))


def trained(objective: Objective, kind: Callable[..., Trainer], data: Data | None = None, micro: int = GLOBAL) -> Trainer:
    engine = ReplicatedEngine(Processes(), ParallelSettings(), "fp32", CONFIG.train.clip, micro, GLOBAL // micro)
    engine.prepare(objective.networks, lambda module: make_optimizer(module, CONFIG.optimizer))
    loader = StepLoader(data or Points(), global_batch_size=GLOBAL, micro_batch_size=micro, rank=0, world_size=1, workers=0,
                        prefetch_steps=2)
    return kind(CONFIG, objective, engine, loader)


def audited(objective: Objective, data: Data | None = None, micro: int = GLOBAL) -> AuditReport:
    trainer = trained(objective, lambda *args: AuditedTrainer(*args, STEPS, "single"), data, micro)
    try:
        return trainer.watch()
    finally:
        trainer.loader.close()


def test_a_clean_run_has_no_fault_and_is_the_run_that_nobody_watched() -> None:
    objective, twin = Adversaries(), Adversaries()
    report = audited(objective)
    assert report.faults() == [] and (report.steps, report.samples) == (STEPS, 2 * STEPS * GLOBAL)
    assert {name: findings.runs for name, findings in report.findings.items()} == \
        {"discriminate": 2 * STEPS, "regularise": 1, "generate": STEPS}
    twin.phases[1] = replace(twin.phases[1], every=STEPS)  # the audit makes it run within its steps
    trainer = trained(twin, lambda *args: Trainer(*args, [Hook()], lambda: "none"))
    trainer.run(1)
    trainer.loader.close()
    for name, network in objective.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, twin.networks[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize("micro", [2, GLOBAL])
def test_the_norm_of_a_term_is_that_of_its_own_gradient(micro: int) -> None:
    """Of the first runs, by hand: each term alone, over the whole batch where no sample depends on another."""
    objective, twin = Adversaries(), Adversaries()
    for each in (objective, twin):
        for network in each.networks.values():
            network[1] = nn.Identity()
    trainer = trained(objective, lambda *args: AuditedTrainer(*args, STEPS, "single"), micro=micro)
    trainer.run_phase(objective.phases[0], 1, trainer.loader.next_batch())
    trainer.loader.close()
    numbers = torch.arange(GLOBAL)
    batch = {"sample": numbers, "x": torch.stack([torch.sin(numbers.float()), torch.cos(2 * numbers.float())], dim=1)}
    for term in ("real", "fake"):
        terms = twin.discriminate(twin.networks, batch, Draws(CONFIG.run.seed, "discriminate", 1, numbers))
        own = torch.autograd.grad(terms[term] / GLOBAL, list(twin.networks["discriminator"].parameters()))
        norm = torch.cat([gradient.flatten() for gradient in own]).norm().item()
        found = trainer.report.findings["discriminate"].norms[term]
        assert found == pytest.approx({"discriminator": norm, "generator": 0.0}, rel=1e-5)
    text = trainer.report.text()
    assert "phase discriminate trains discriminator" in text and "no part of the loss: logit" in text and "frozen" in text


def test_every_term_is_measured_with_the_singular_vectors_of_the_update() -> None:
    """However many forwards that takes."""
    seen: list[Tensor] = []
    objective = Adversaries()
    layer = spectral_norm(nn.Linear(2, 8))
    objective.networks["discriminator"] = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 1))
    vectors = layer.parametrizations.weight[0]
    with torch.no_grad():
        vectors.u.copy_(F.normalize(torch.ones(8), dim=0))
    plain = objective.phases[0].loss

    def watched(*arguments: Any) -> Terms:
        terms = plain(*arguments)
        seen.append(vectors.u.clone())
        return terms

    objective.phases = [replace(objective.phases[0], loss=watched), objective.phases[2]]
    trainer = trained(objective, lambda *args: AuditedTrainer(*args, 1, "single"), micro=3)
    trainer.run_phase(objective.phases[0], 1, trainer.loader.next_batch())
    trainer.loader.close()
    assert len(seen) == 2 * 2 + 2  # terms and micro-batches, and the phase's own
    assert all(torch.equal(each, seen[0]) for each in seen)


def thaw(networks: Networks, terms: Terms) -> None:
    networks["discriminator"].requires_grad_(True)
    terms["leak"] = 1e-3 * networks["discriminator"](torch.ones(2, 2)).sum() + 0 * terms["fool"]


def overwrite(networks: Networks, terms: Terms) -> None:
    with torch.no_grad():
        networks["discriminator"][0].bias[3] += 2e-7


def move_statistics(networks: Networks, terms: Terms) -> None:
    networks["discriminator"].train()(torch.ones(2, 2))


def detach(networks: Networks, terms: Terms) -> None:
    terms["size"] = terms["size"].detach()


def multiply_by_zero(networks: Networks, terms: Terms) -> None:
    terms["size"] = terms["size"] * 0


@pytest.mark.parametrize(("plant", "faults"), [
    (thaw, ["phase generate trains generator and changes discriminator: gradient of 0.bias, gradient of 0.weight, ",
            "phase generate: term leak is dead: its gradient in generator is zero in 3 runs",
            "phase generate trains generator, and its term leak has a gradient in discriminator"]),
    (overwrite, ["phase generate trains generator and changes discriminator: weight 0.bias"]),
    (move_statistics, ["phase generate trains generator and changes discriminator: "
                       "buffer 1.num_batches_tracked, buffer 1.running_mean, buffer 1.running_var"]),
    (detach, ["phase generate: term size is dead: its gradient in generator is zero in 3 runs"]),
    (multiply_by_zero, ["phase generate: term size is dead: its gradient in generator is zero in 3 runs"]),
])  # fmt: skip
def test_a_planted_leak_or_dead_term_is_named(plant: Callable[[Networks, Terms], None], faults: list[str]) -> None:
    report = audited(Adversaries(plant), micro=3)
    found = report.faults()
    assert len(found) == len(faults)
    for line, wanted in zip(found, faults, strict=True):
        assert line.startswith(wanted) and "\n" not in line
    assert report.text().count("fault: ") == len(faults)


def test_a_parameter_that_no_phase_reaches_is_named() -> None:
    objective = Adversaries()
    objective.networks["generator"].add_module("spare", nn.Linear(2, 2))
    objective.networks["generator"].forward = lambda z, parts=list(objective.networks["generator"])[:4]: \
        nn.Sequential(*parts)(z)
    (fault,) = audited(objective).faults()
    assert fault == "generator: no phase gave a gradient in 3 steps to spare.weight, spare.bias"


def test_a_gradient_that_cancels_out_is_one() -> None:
    """Of the discriminator's last bias, where reals and fakes pull alike: the start of every hinge loss."""
    objective = Adversaries()

    def cancelling(networks: Networks, batch: Batch, draws: Draws) -> Terms:
        networks["generator"].eval()
        real, fake = (networks["discriminator"](x) for x in (batch["x"], networks["generator"](draws.normal("z", NOISE))))
        return {"real": (1 - real).relu().sum() + (1 + fake).relu().sum()}

    objective.phases = [replace(objective.phases[0], loss=cancelling, statistics=frozenset()), objective.phases[2]]
    trainer = trained(objective, lambda *args: AuditedTrainer(*args, 1, "single"))
    batch = trainer.loader.next_batch()[0]
    cancelling(objective.networks, batch, Draws(0, "", 1, batch["sample"]))["real"].backward()
    assert objective.networks["discriminator"][3].bias.grad == 0
    trainer.loader.close()
    assert audited(objective).faults() == []


def test_data_that_repeats_itself_is_named() -> None:
    (fault,) = audited(Adversaries(), Points(broken=True)).faults()
    assert fault.startswith("repeated samples: in step 1 sample 0 on rank 0 and sample 1 on rank 0 have the same content, ")


def test_samples_that_two_ranks_see_are_named() -> None:
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (3, "d")]]) == []
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (2, "c")]]) == ["sample 2 on rank 0 and again on rank 1"]
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (3, "a")]]) == \
        ["sample 0 on rank 0 and sample 3 on rank 1 have the same content"]
    assert repeated([[(0, "a"), (0, "a")], []]) == ["sample 0 on rank 0 and again on rank 0"]


def test_two_processes_are_audited_without_a_trace(genscale_process, tiny_config, tiny_run) -> None:
    done = genscale_process("train", "--processes", 2, "--config", tiny_config, "--audit", 2, timeout=100)
    assert done.code == 0, done.err
    assert "2 processes" in done.out and "8 samples in 2 steps; no leak, no dead term, no repeated sample" in done.out
    assert not tiny_run.exists()


def test_a_fault_ends_the_command_with_code_2(genscale, tmp_path) -> None:
    """Every picture is in the data set twice, and one term of the loss is weighted with 0."""
    pictures = np.random.default_rng(0).integers(0, 256, (24, 16, 16), np.uint8)
    np.savez(tmp_path / "twice.npz", images=np.concatenate([pictures, pictures]))
    settings = {"model": {"family": "vae", "width": 8, "multipliers": [1, 1], "latents": 4},
                "data": {"source": str(tmp_path / "twice.npz"), "size": 16, "channels": 1, "validation_fraction": 0.2},
                "objective": {"beta": 0.0}, "train": {"global_batch_size": 30}, "run": {"dir": str(tmp_path / "runs")}}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(settings))
    done = genscale("train", "--config", tmp_path / "twice.yaml", "--audit", 2)
    assert done.code == 2, done.err
    dead, repeats = [line for line in done.out.splitlines() if line.startswith("fault: ")]
    assert dead == "fault: phase vae: term kl is dead: its gradient in vae is zero in 2 runs"
    assert repeats.startswith("fault: repeated samples: in step 1 sample ") and "have the same content" in repeats
    assert not (tmp_path / "runs").exists()
