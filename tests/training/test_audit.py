"""The audit against faults that were planted, one of each kind, and against gradients taken by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from genscale.data.lanes import Data
from genscale.inspection.audit import AuditedTrainer
from genscale.inspection.audit_probe import repeated
from genscale.inspection.audit_report import AuditReport
from genscale.models.image_layers import spectral_norm
from genscale.objectives.base import Batch, Networks, Objective, Terms
from genscale.rng import Draws
from genscale.settings.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.testing.objectives import ToyGAN, point
from genscale.testing.toy import ToyData
from genscale.testing.training import Training

GLOBAL, STEPS = 6, 3


class Adversaries(ToyGAN):
    """With a regulariser every eighth step, and room for faults: `plant` is called in the generator's phase."""

    def __init__(self, plant: Callable[[Networks, Terms], None] | None = None, norm: Any = nn.BatchNorm1d) -> None:
        super().__init__(norm=norm, repeats=2, regularise_every=8)
        self.plant = plant

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        terms = {"fool": super().generate(networks, batch, draws)["loss"],
                 "size": 0.1 * self.made(networks, draws).square().sum()}
        if self.plant is not None:
            self.plant(networks, terms)
        return terms


CONFIG = Config(train=TrainSettings(steps=STEPS, global_batch_size=GLOBAL, clip=0.5),
                optimizer=OptimizerSettings(lr=1e-2), schedule=ScheduleSettings(name="constant"))


def training(objective: Objective, data: Data | None = None, micro: int = GLOBAL, steps: int = STEPS) -> Training:
    config = replace(CONFIG, train=replace(CONFIG.train, micro_batch_size=micro))
    return Training(objective, data or ToyData(point, GLOBAL), config,
                    trainer=lambda *args: AuditedTrainer(*args, steps, "single"))


def audited(objective: Objective, data: Data | None = None, micro: int = GLOBAL) -> AuditReport:
    with training(objective, data, micro) as found:
        return found.trainer.watch()


def test_a_clean_run_has_no_fault_and_is_the_run_that_nobody_watched() -> None:
    objective, twin = Adversaries(), Adversaries()
    report = audited(objective)
    assert report.faults() == [] and (report.steps, report.samples) == (STEPS, 2 * STEPS * GLOBAL)
    assert {name: findings.runs for name, findings in report.findings.items()} == \
        {"discriminate": 2 * STEPS, "regularise": 1, "generate": STEPS}
    twin.phases[1] = replace(twin.phases[1], every=STEPS)  # the audit makes it run within its steps
    Training(twin, ToyData(point, GLOBAL), CONFIG).run()
    for name, network in objective.networks.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, twin.networks[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize("micro", [2, GLOBAL])
def test_the_norm_of_a_term_is_that_of_its_own_gradient(micro: int) -> None:
    """Of the first runs, by hand: each term alone, over the whole batch where no sample depends on another."""
    objective, twin = (Adversaries(norm=lambda width: nn.Identity()) for _ in range(2))
    with training(objective, micro=micro) as found:
        found.trainer.run_phase(objective.phases[0], 1, found.loader.next_batch())
    numbers = torch.arange(GLOBAL)
    batch = {"sample": numbers, "x": torch.stack([torch.sin(numbers.float()), torch.cos(2 * numbers.float())], dim=1)}
    for term in ("real", "fake"):
        terms = twin.discriminate(twin.networks, batch, Draws(CONFIG.run.seed, "discriminate", 1, numbers))
        own = torch.autograd.grad(terms[term] / GLOBAL, list(twin.networks["discriminator"].parameters()))
        norm = torch.cat([gradient.flatten() for gradient in own]).norm().item()
        measured = found.trainer.report.findings["discriminate"].norms[term]
        assert measured == pytest.approx({"discriminator": norm, "generator": 0.0}, rel=1e-5)
    text = found.trainer.report.text()
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
    with training(objective, micro=3, steps=1) as found:
        found.trainer.run_phase(objective.phases[0], 1, found.loader.next_batch())
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
        real, fake = (0.1 * networks["discriminator"](x) for x in (batch["x"], objective.made(networks, draws)))
        return {"real": (1 - real).relu().sum() + (1 + fake).relu().sum()}

    objective.phases = [replace(objective.phases[0], loss=cancelling, statistics=frozenset()), objective.phases[2]]
    with training(objective) as found:
        batch = found.loader.next_batch()[0]
    cancelling(objective.networks, batch, Draws(0, "", 1, batch["sample"]))["real"].backward()
    assert objective.networks["discriminator"][3].bias.grad == 0
    assert audited(objective).faults() == []


def test_data_that_repeats_itself_is_named() -> None:
    pairs = ToyData(lambda g: point(g - g % GLOBAL + g % GLOBAL // 2), GLOBAL)
    (fault,) = audited(Adversaries(), pairs).faults()
    assert fault.startswith("repeated samples: in step 1 sample 0 on rank 0 and sample 1 on rank 0 have the same content, ")


def test_samples_that_two_ranks_see_are_named() -> None:
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (3, "d")]]) == []
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (2, "c")]]) == ["sample 2 on rank 0 and again on rank 1"]
    assert repeated([[(0, "a"), (2, "c")], [(1, "b"), (3, "a")]]) == \
        ["sample 0 on rank 0 and sample 3 on rank 1 have the same content"]
    assert repeated([[(0, "a"), (0, "a")], []]) == ["sample 0 on rank 0 and again on rank 0"]


def test_two_processes_are_audited_without_a_trace(genscale_group, tiny_config, tiny_run) -> None:
    done = genscale_group("train", "--config", tiny_config, "--audit", 2, timeout=100)
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
