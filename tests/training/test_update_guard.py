"""Updates that would do harm are left out without a trace: judged on the host or on the device, with fp16's loss scaler, and
for losses that stand out."""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.loader import StepLoader
from genscale.hook import Hook, every
from genscale.models.batch_norm import BatchNorm
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel.strategies import ParallelPlan
from genscale.rng import Draws
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.supervise.signals import StopSignal
from genscale.testing.objectives import BareObjective
from genscale.testing.toy import ToyData
from genscale.testing.training import Training, same
from genscale.training.non_finite import NonFiniteLoss
from genscale.training.spikes import LossWindow
from genscale.training.trainer import Trainer

GLOBAL = 4


def numbers(bad: Collection[int] = ()) -> ToyData:
    """Sample g is one number, NaN in some global batches."""

    def sample(g: int) -> Sample:
        batch, lane = divmod(g, GLOBAL)
        return {"x": np.array([math.nan if batch in bad and lane == 1 else math.sin(g)], np.float32)}

    return ToyData(sample, GLOBAL)


class Fit(BareObjective):
    """One network with running statistics and an average; the loss is scaled by what `scale` says of a step."""

    averaged = ("fit",)

    def __init__(self, scale: Callable[[int], float] = lambda step: 1.0) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 8), BatchNorm(8), nn.Tanh(), nn.Linear(8, 1))
        nn.init.ones_(network[1].weight)
        for tensor, value in zip((network[1].bias, *network[1].buffers()), (0, 0, 1), strict=True):
            nn.init.constant_(tensor, value)
        super().__init__({"fit": network}, [Phase("fit", "fit", self.loss, self.count, statistics=frozenset({"size"}))])
        self.scale = scale

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        made, wanted = networks["fit"](batch["x"]).float(), batch["x"].square()
        return {"error": (made - wanted).square().sum() * self.scale(draws.step), "size": made.detach().abs().sum()}


def trainer_of(objective: Objective, bad: set[int], precision: str = "fp32", steps: int = 8, hooks: Sequence[Hook] = (),
               **guards: Any) -> Trainer:
    config = Config(train=TrainSettings(steps=steps, global_batch_size=GLOBAL, ema_half_life=20, ema_ramp_up=0),
                    optimizer=OptimizerSettings(lr=0.01), schedule=ScheduleSettings(name="constant"),
                    guards=GuardSettings(**guards))
    return Training(objective, numbers(bad), config, plan=ParallelPlan("single", "none", precision, 1), hooks=hooks).trainer


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    engine = trainer.engine
    parts = {"network": engine.network_pieces("fit"), "optimizer": engine.optimizer_pieces("fit"),
             "average": engine.average_pieces("fit")}
    return {f"{kind}/{piece.name}": piece.values.detach().clone() for kind, pieces in parts.items() for piece in pieces}


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_that_was_left_out_changes_nothing(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, counters, running statistics and average; where the device decides alone, too."""
    trainer = trainer_of(Fit(), {2, 4})
    monkeypatch.setattr(trainer, "_runs_ahead", ahead)
    changed = []
    with StopSignal() as stop:
        for step in range(1, 7):
            before = state_of(trainer)
            report = trainer.train_step(step, stop)
            changed.append(not same(before, state_of(trainer)))
            assert ("loss" in report.metrics) != ahead
    trainer.loader.close()
    assert changed == [True, True, False, True, False, True]
    assert all(tensor.isfinite().all() for tensor in state_of(trainer).values())
    assert trainer.state()["left_out"] == 2


def test_a_device_that_decides_alone_comes_to_the_weights_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host, device = trainer_of(Fit(), {3}), trainer_of(Fit(), {3})
    monkeypatch.setattr(device, "_runs_ahead", True)
    for trainer in (host, device):
        trainer.run(1)
        trainer.loader.close()
    assert same(state_of(host), state_of(device)) and host.state() == device.state()


def test_the_loss_scaler_keeps_its_scale_where_the_loss_is_no_number_and_lowers_it_where_the_gradient_overflows() -> None:
    trainer = trainer_of(Fit(lambda step: 1e6 if step == 3 else 1e-2), {1}, "fp16")
    scales = []
    with StopSignal() as stop:
        for step in range(1, 5):
            before = state_of(trainer)
            trainer.train_step(step, stop)
            after = state_of(trainer)
            scales.append(trainer.engine.scaler_state("fit")["scale"])
            weights = [key for key in before if key.startswith(("network/0", "optimizer"))]
            assert all(torch.equal(before[key], after[key]) for key in weights) == (step in (2, 3)) or step == 1
    trainer.loader.close()
    assert scales == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    assert trainer.state()["rows"] == {} and trainer.state()["left_out"] == 2


def test_a_spike_is_judged_by_mean_and_deviation_of_the_last_128() -> None:
    generator, window = random.Random(0), LossWindow()
    losses = [generator.gauss(3, 0.5) for _ in range(200)]
    for count, loss in enumerate(losses):
        last = losses[max(0, count - 128) : count]
        if count < 32:
            assert window.deviations(1e9) == -math.inf
        else:
            assert window.deviations(loss) == pytest.approx((loss - statistics.mean(last)) / statistics.pstdev(last))
        window.add(loss)
    again = LossWindow(window.state())
    assert again.deviations(5.0) == window.deviations(5.0) and len(again.state()) == 128


@pytest.mark.parametrize(("policy", "left_out"), [("ignore", 0), ("skip", 1), ("stop", None)])
def test_a_loss_that_stands_out(policy: str, left_out: int | None) -> None:
    trainer = trainer_of(Fit(lambda step: 1e6 if step == 40 else 1.0), set(), steps=44, spikes=policy)
    with StopSignal() as stop:
        for step in range(1, 45):
            before = state_of(trainer)
            if step == 40 and left_out is None:
                with pytest.raises(NonFiniteLoss, match=r"fit/loss is .* at step 40, .* standard deviations above the mean"):
                    trainer.train_step(step, stop)
                break
            trainer.train_step(step, stop)
            assert same(before, state_of(trainer)) == (step == 40 and policy == "skip")
    trainer.loader.close()
    if left_out is not None:
        assert trainer.state()["left_out"] == left_out
    assert len(trainer.state()["losses"].get("fit", [])) == {"ignore": 0, "skip": 43, "stop": 39}[policy]


@pytest.mark.parametrize("ahead", [False, True])
def test_no_checkpoint_is_made_while_updates_are_left_out_but_right_after(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[int] = []
    saving = every(4, lambda report: reports.append(report.step))
    saving.sound = True
    trainer = trainer_of(Fit(), {3, 4, 7}, hooks=[saving])
    monkeypatch.setattr(trainer, "_runs_ahead", ahead)
    trainer.run(1)
    trainer.loader.close()
    assert reports == [6, 8]  # due at 4 and 8; the last comes in any case


def test_batches_that_are_left_out_might_never_have_been_there() -> None:
    """At any shape, also from a state in the middle, and samples keep their numbers without a gap."""

    class Without(ToyData):
        def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
            for sample, after in super().open_lane(lane, cursor):
                if after["position"] - 1 not in (1, 2, 5):
                    yield sample, after

    def batches(data: Data, world_size: int, **options: Any) -> list[dict[str, Tensor]]:
        loaders = [StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=2, rank=rank, world_size=world_size, workers=0,
                              prefetch_steps=2, **options) for rank in range(world_size)]
        found = []
        for _ in range(5):
            peeked = [loader.peek() for loader in loaders]
            parts = [loader.next_batch() for loader in loaders]
            for first, second in zip(peeked, parts, strict=True):
                assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)
            flat = [micro for part in parts for micro in part]
            order = torch.cat([micro["sample"] for micro in flat]).argsort()
            found.append({key: torch.cat([micro[key] for micro in flat])[order] for key in flat[0]})
        for loader in loaders:
            loader.close()
        return found

    expected = batches(Without(numbers().sample, GLOBAL), 1)
    for world_size in (1, 2):
        for mine, theirs in zip(batches(numbers(), world_size, left_out={1, 2, 5}), expected, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)

    loader = StepLoader(numbers(), global_batch_size=GLOBAL, micro_batch_size=GLOBAL, rank=0, world_size=1,
                        workers=0, prefetch_steps=2, left_out={1})
    loader.next_batch()
    state = copy.deepcopy(loader.state())
    for _ in range(3):
        loader.next_batch()
    loader.go_back(state, {1, 2, 5})
    for theirs in expected[1:]:
        (mine,) = loader.next_batch()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert loader.batch == 7
    loader.close()
