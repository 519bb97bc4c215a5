"""Learning-rate shares against torch's own schedulers where these coincide, and against closed forms elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from genscale.settings.config import ScheduleSettings
from genscale.training.schedules import average_decay, learning_rate_share

STEPS, WARMUP = 50, 10


def shares(name: str, steps: int = STEPS, **settings: float) -> list[float]:
    schedule = ScheduleSettings(name=name, **settings)
    return [learning_rate_share(step, steps, schedule) for step in range(1, steps + 1)]


def torch_shares(make_decay) -> list[float]:
    """Shares of a torch warm-up that is handed over to `make_decay(optimizer)` at the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
    schedule = SequentialLR(optimizer, [warmup, make_decay(optimizer)], milestones=[WARMUP - 1])
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_is_torchs(final: float) -> None:
    expected = torch_shares(lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=final))
    assert shares("cosine", warmup_steps=WARMUP, final_share=final) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_linear_is_torchs(final: float) -> None:
    expected = torch_shares(lambda optimizer: LinearLR(optimizer, 1.0, final, total_iters=STEPS - WARMUP))
    assert shares("linear", warmup_steps=WARMUP, final_share=final) == pytest.approx(expected, abs=1e-12)


def test_constant_and_wsd() -> None:
    warmup = [step / WARMUP for step in range(1, WARMUP + 1)]
    assert shares("constant", warmup_steps=WARMUP) == pytest.approx(warmup + [1.0] * (STEPS - WARMUP))
    # 0.3 of 50 steps decay: from 1 after step 35 down to 0.2 at step 50, by equal amounts.
    decay = [1 - 0.8 * step / 15 for step in range(1, 16)]
    found = shares("wsd", warmup_steps=WARMUP, final_share=0.2, decay_share=0.3)
    assert found == pytest.approx(warmup + [1.0] * (STEPS - WARMUP - 15) + decay)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_at_the_final_share(name: str) -> None:
    assert shares(name, final_share=0.25)[-1] == pytest.approx(0.25)
    assert shares(name, warmup_steps=WARMUP, final_share=0.0)[-1] == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (5, 5), (5, 100), (3, 2)])
def test_short_runs_stay_in_range(name: str, steps: int, warmup: int) -> None:
    found = shares(name, steps, warmup_steps=warmup, decay_share=1.0)
    assert all(0 < share <= 1 for share in found)
    rising = min(steps, warmup - 1)
    assert found[:max(rising, 0)] == [step / warmup for step in range(1, rising + 1)]


def test_an_average_forgets_half_in_its_half_life():
    samples, half_life = 32, 320
    left = 1.0
    for step in range(1001, 1011):  # 320 samples, long after the ramp
        left *= average_decay(step, samples, half_life, ramp_up=0.05)
    assert left == pytest.approx(0.5)


def test_the_first_update_of_an_average_makes_it_the_weights():
    assert average_decay(1, 32, 10_000, ramp_up=0.05) == 0.0
    # No limit: the initial weights are part of it.
    assert average_decay(1, 32, 320, ramp_up=0.0) == pytest.approx(2**-0.1)


def test_a_young_average_has_a_half_life_of_a_share_of_what_was_seen():
    """After 100 steps of 32 samples a twentieth of them is 160 samples, five steps."""
    assert average_decay(101, 32, 10_000, ramp_up=0.05) == pytest.approx(0.5 ** (1 / 5))
