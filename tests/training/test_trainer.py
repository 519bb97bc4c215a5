"""The loop against loops written out by hand: one network, and two networks that train against each other."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.data.lanes import Sample
from genscale.data.text.tokenizers import ByteTokenizer
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.families.gpt.objective import LanguageModel
from genscale.hook import Hook, StepReport, every
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel.processes import HostCopy
from genscale.rng import Draws
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.supervise.signals import StopSignal
from genscale.testing.objectives import ToyGAN, point
from genscale.testing.toy import ToyData
from genscale.testing.training import Training
from genscale.training.non_finite import NonFiniteLoss
from genscale.training.optimizers import make_optimizer
from genscale.training.schedules import learning_rate_share
from genscale.training.trainer import Trainer

GLOBAL, STEPS = 6, 5


def sample(g: int) -> Sample:
    """A point, and whether it is valid: every third is not."""
    return {**point(g), "valid": np.array(g % 3 > 0)}


def batch_of(numbers: Sequence[int]) -> Batch:
    samples = [sample(g) for g in numbers]
    return {"x": torch.tensor(np.stack([s["x"] for s in samples])), "valid": torch.tensor([bool(s["valid"]) for s in samples])}


class Adversaries(ToyGAN):
    """The discriminator takes two batches a step, the generator one, and a regulariser comes every second step."""

    def __init__(self) -> None:
        super().__init__(norm=lambda width: nn.Dropout(0.0), repeats=2, regularise_every=2)
        self.seen: list[tuple[str, dict[str, set[bool]]]] = []

    def discriminate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        self._see("discriminate", networks)
        return super().discriminate(networks, batch, draws)

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        self._see("generate", networks)
        return super().generate(networks, batch, draws)

    def _see(self, phase: str, networks: Networks) -> None:
        flags = {name: {p.requires_grad for p in network.parameters()} for name, network in networks.items()}
        self.seen.append((phase, flags))


def settings(steps: int = STEPS, **optimizer: Any) -> Config:
    return Config(train=TrainSettings(steps=steps, global_batch_size=GLOBAL, clip=0.5),
                  optimizer=OptimizerSettings(**{"name": "sgd", "lr": 0.3, "momentum": 0.9, **optimizer}),
                  schedule=ScheduleSettings(name="linear", warmup_steps=2))


def trainer_of(objective: Objective, config: Config, micro: int, hooks: Sequence[Hook] = ()) -> Trainer:
    config = replace(config, train=replace(config.train, micro_batch_size=micro))
    return Training(objective, ToyData(sample, lanes=4), config, trainer=lambda *made: Trainer(
        *made, hooks, last_good=lambda: "step-9")).trainer


def by_hand(objective: Adversaries, config: Config) -> list[dict[str, float]]:
    """The same training, written out: whole batches, means over the valid samples, one optimizer a network."""
    networks = objective.networks
    optimizers = {name: make_optimizer(network, config.optimizer) for name, network in networks.items()}
    history = []

    def update(name: str, phase: str, terms: Terms, valid: int) -> dict[str, float]:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        parts = [key for key in terms if key != "logit"]
        (sum(terms[key] for key in parts) / valid).backward()
        norm = nn.utils.clip_grad_norm_(networks[name].parameters(), config.train.clip)
        optimizers[name].step()
        means = {f"{phase}/{key}": value.item() / valid for key, value in terms.items()}
        return {f"{phase}/loss": sum(means[f"{phase}/{key}"] for key in parts), **means, f"{phase}/grad_norm": norm.item()}

    for step in range(1, config.train.steps + 1):
        lr = config.optimizer.lr * learning_rate_share(step, config.train.steps, config.schedule)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
        metrics = {"learning_rate": lr}
        for repeat in range(2):
            numbers = range((2 * (step - 1) + repeat) * GLOBAL, (2 * (step - 1) + repeat + 1) * GLOBAL)
            batch = batch_of(numbers)
            valid = int(batch["valid"].sum())

            due = [("discriminator", "discriminate")]
            if repeat == 0:
                due += [("discriminator", "regularise")] * (step % 2 == 0) + [("generator", "generate")]
            for name, phase in due:
                draws = Draws(config.run.seed, phase, step, torch.tensor(list(numbers)))
                metrics |= update(name, phase, getattr(objective, phase)(networks, batch, draws), valid)
        history.append(metrics)
    return history


@pytest.mark.parametrize("micro", [1, 2, 6])
def test_two_networks_follow_the_loop_written_by_hand(micro: int) -> None:
    objective, twin = Adversaries(), Adversaries()
    history: list[dict[str, float]] = []
    trainer = trainer_of(objective, settings(), micro, [every(1, lambda report: history.append(report.metrics))])
    report = trainer.run(1)
    trainer.loader.close()
    expected = by_hand(twin, settings())
    assert report.step == STEPS and report.last and not report.stopped
    assert ["regularise/loss" in metrics for metrics in history] == [False, True, False, True, False]
    for found, wanted in zip(history, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for name, network in objective.networks.items():
        for mine, theirs in zip(network.parameters(), twin.networks[name].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_all_phases_of_a_batch_are_counted_in_one_sum_that_no_forward_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Adversaries()
    trainer = trainer_of(objective, settings(), 6)
    begin, events = trainer.processes.begin_sum_of_numbers, []

    def noted(*numbers: int) -> Callable[[], list[int]]:
        events.append(f"sum of {len(numbers)} begun")
        wait = begin(*numbers)
        return lambda: events.append("waited for") or wait()

    monkeypatch.setattr(trainer.processes, "begin_sum_of_numbers", noted)
    objective.networks["discriminator"].register_forward_hook(lambda *_: events.append("forward"))
    with StopSignal() as stop:
        trainer.train_step(1, stop)
        del events[:]
        trainer.train_step(2, stop)
    trainer.loader.close()
    assert [event for event in events if "begun" in event] == ["sum of 3 begun", "sum of 1 begun"]  # two batches, four phases
    assert events.index("forward") < events.index("waited for")


def test_rates_of_several_networks_keep_their_names_to_the_last_step() -> None:
    """Where a schedule ends in zero, they are all the same there."""
    config = replace(settings(steps=3, lr_of={"generator": 0.1}), schedule=ScheduleSettings(name="linear", final_share=0.0))
    rates: list[list[float | None]] = []
    trainer = trainer_of(Adversaries(), config, 6, [every(1, lambda report: rates.append(
        [report.metrics.get(f"learning_rate/{name}") for name in ("generator", "discriminator")]))])
    trainer.run(1)
    trainer.loader.close()
    assert rates == [pytest.approx([0.1 * share, 0.3 * share]) for share in (2 / 3, 1 / 3, 0)]


def test_a_phase_trains_its_own_network_alone() -> None:
    objective = Adversaries()
    trainer = trainer_of(objective, settings(), 3)
    batches = trainer.loader.next_batch()
    trainer._set_learning_rates(1)
    for phase, frozen in (("discriminate", "generator"), ("generate", "discriminator")):
        before = {name: copy.deepcopy(network.state_dict()) for name, network in objective.networks.items()}
        trainer.run_phase(next(each for each in objective.phases if each.name == phase), 1, batches)
        for name, network in objective.networks.items():
            same = all(torch.equal(value, before[name][key]) for key, value in network.state_dict().items())
            assert same == (name == frozen)
            assert all(p.grad is None for p in network.parameters())
    trainer.loader.close()
    trained = {"discriminate": "discriminator", "generate": "generator"}
    assert len(objective.seen) == 4
    for phase, gradients in objective.seen:
        assert gradients == {name: {name == trained[phase]} for name in objective.networks}


def test_hooks_come_when_due_and_after_the_last_step() -> None:
    called: dict[int, list[int]] = {0: [], 2: [], 3: []}
    hooks = [every(steps, lambda report, steps=steps: called[steps].append(report.step)) for steps in called]
    trainer = trainer_of(Adversaries(), settings(), 6, hooks)
    trainer.run(1)
    trainer.loader.close()
    assert called == {0: [5], 2: [2, 4, 5], 3: [3, 5]}


def test_a_signal_ends_the_run_after_the_step() -> None:
    reports: list[StepReport] = []

    def interrupt(report: StepReport) -> None:
        reports.append(report)
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_of(Adversaries(), settings(steps=50), 6, [every(1, interrupt)])
    report = trainer.run(1)
    trainer.loader.close()
    assert (report.step, report.stopped, report.last, trainer.stop.agreed) == (3, True, True, signal.SIGTERM)
    assert [each.stopped for each in reports] == [False, False, True]


class Diverging(Adversaries):
    """Its generator's loss stops being a number at a step, in value or in gradient only."""

    frozen = {"discriminator": "its own draw"}

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.phases = [Phase("generate", "generator", self.generate, self.count)]

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        loss = super().generate(networks, batch, draws)["loss"]
        if draws.step == 3:
            zero: Tensor = loss * 0
            loss = loss * float(self.kind) if self.kind != "gradient" else loss + torch.sqrt(zero)  # slope infinite at 0
        return {"loss": loss}


def stopping() -> Config:
    return replace(settings(), guards=GuardSettings(non_finite="stop"))


@pytest.mark.parametrize("kind, words", [("nan", "generate/loss became nan at step 3 on rank 0"),
                                         ("inf", "generate/loss became inf at step 3 on rank 0"),
                                         ("gradient", r"the gradient of generator became nan at step 3 .the loss was finite.")])
def test_a_loss_that_is_no_number_stops_the_run(kind: str, words: str) -> None:
    trainer = trainer_of(Diverging(kind), stopping(), 6)
    with StopSignal() as stop:
        trainer.train_step(1, stop)
        trainer.train_step(2, stop)
        with pytest.raises(NonFiniteLoss, match=f"{words}.* last good checkpoint: step-9; try a lower optimizer.lr"):
            trainer.train_step(3, stop)
    trainer.loader.close()


class HostReads(TorchDispatchMode):
    """Names the operations that make the host wait for a device's numbers: `.item()`, `.tolist()`, masks of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, reads_of_the_outcome", [("adamw", 0), ("muon", 1), ("sgd", 1)])
def test_nothing_in_a_phase_waits_for_the_device(name: str, reads_of_the_outcome: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, backward, clipping and update of a language model are launched without a look at any number they make, but for one
    at whether the update may be made, where the optimizer cannot leave it out by itself."""
    network = GPT(GPTSettings(layers=1, heads=2, width=32, positions=16, preset="qwen3"), 64)
    network.initialise(0)
    config = settings(name=name, momentum=0.0)
    objective = LanguageModel(network, ByteTokenizer(), 16)
    trainer = trainer_of(objective, config, 3)
    monkeypatch.setattr(trainer, "_runs_ahead", True)
    read, copies_read = HostCopy.read, []
    monkeypatch.setattr(HostCopy, "read", lambda copy: copies_read.append(copy) or read(copy))
    trainer.loader.close()
    batches = [{"tokens": torch.arange(51).view(3, 17) + shift, "sample": torch.arange(3)} for shift in (0, 5)]
    trainer.run_phase(objective.phases[0], 1, batches)  # builds the optimizer's state
    # What is known on the host alone may be read there.
    counts = [objective.count(batch) for batch in batches]
    phase = replace(objective.phases[0], count=lambda batch: counts[0])
    copies_read.clear()
    with HostReads() as reads:
        trainer.run_phase(phase, 2, batches)
    assert reads.seen == [] and len(copies_read) == reads_of_the_outcome


def test_a_gpu_is_given_the_next_step_before_the_last_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is not the CPU, steps are settled one later, and before each hook that wants to know."""
    trainer = trainer_of(Diverging("nan"), stopping(), 6, [])
    monkeypatch.setattr(trainer, "_runs_ahead", True)
    with StopSignal() as stop:
        first = trainer.train_step(1, stop)
        assert "loss" not in first.metrics
        second = trainer.train_step(2, stop)
        assert "loss" in first.metrics and "loss" not in second.metrics
        trainer.train_step(3, stop)  # the one that diverges
        with pytest.raises(NonFiniteLoss, match="at step 3 on rank 0"):
            trainer.train_step(4, stop)
    trainer.loader.close()


def test_no_settled_hook_sees_a_step_that_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    unsettled = Hook()
    unsettled.settled = False
    trainer = trainer_of(Diverging("nan"), stopping(), 6, [every(3, lambda report: saved.append(report.step)), unsettled])
    monkeypatch.setattr(trainer, "_runs_ahead", True)
    with pytest.raises(NonFiniteLoss, match="at step 3 on rank 0"):
        trainer.run(1)
    trainer.loader.close()
    assert saved == []
