"""What is wrong with a policy gradient shows against an optimum that is known exactly, and nothing does with genscale's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TRAPS = [
    "k1 in the loss",
    "Dr. GRPO with k3 in the loss",
    "k3 x ratio in the loss",
    "advantage not detached",
    "end of text outside log p",
    "cut texts dropped",
    "temperature 0.7, divergence by the sampler's log p",
]


@pytest.fixture
def tabular(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The benchmark's policies: what docs/concepts/reward.md shows of them is what is tried here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import reward_tabular

    yield reward_tabular
    torch.set_num_threads(threads)


def test_every_trap_is_seen_and_genscale_falls_into_none(tabular):
    own = tabular.measure(tabular.GENSCALE, seeds=1, steps=800, texts=32)
    assert own["total_variation"][0] < 0.02
    for gap in (own["gap"][0], own["estimated_gap"][0]):  # Pinsker's inequality
        assert own["total_variation"][0] <= math.sqrt(gap / 2)
    far = {name: tabular.measure(name, seeds=1, steps=300, texts=32)["total_variation"][0] for name in TRAPS}
    assert min(far.values()) > 0.1, far


def test_the_optimum_is_where_the_exact_gradient_leads(tabular):
    """Of all texts, weighed by how often they are written: without a draw."""
    tables = tabular.Tables(seeds=1)
    optimizer = torch.optim.Adam([tables.logits], lr=0.1)
    for _ in range(300):
        log_p = tabular.log_texts(tables.logits)
        optimizer.zero_grad()
        (-(log_p.exp() * (tables.reward - tabular.BETA * (log_p - tables.log_reference))).sum()).backward()
        optimizer.step()
    assert tables.distance().max() < 1e-3
    assert torch.allclose(tabular.log_texts(tables.logits.detach()).exp().sum(1), torch.ones(4, dtype=torch.double))
