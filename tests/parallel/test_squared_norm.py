"""The norm of gradients of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genscale.parallel.gradients import SHORT, squared_norm
from genscale.rng import torch_generator

LAID = (64, 48, 4, 4)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, *shape))


@pytest.mark.parametrize("gradients", [
    [], [torch.zeros(0)], [torch.tensor(3.0)], [random(5), random(2, 7), torch.zeros(0, 4)], [random(SHORT + 1)],
    [random(300, 401).T], [random(*LAID).contiguous(memory_format=torch.channels_last)], [1e15 * random(SHORT + 7)],
    [random(12), random(2 * SHORT), random(3, 3)],
], ids=["none", "empty", "scalar", "short", "long", "transposed", "channels-last", "huge", "mixed"])  # fmt: skip
def test_the_squared_norm_is_that_of_fp64(gradients: list[Tensor]) -> None:
    found = squared_norm(gradients)
    assert found.dtype == torch.float64 and found.ndim == 0
    assert found.item() == pytest.approx(sum(gradient.double().square().sum().item() for gradient in gradients), rel=3e-8)
