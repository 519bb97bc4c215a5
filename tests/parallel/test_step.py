"""The clip factor inside the optimizer's kernel, against gradients scaled before it. (The CPU has the same kernel.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.parallel.averages import local
from genscale.parallel.gradients import clip_factor, squared_norm
from genscale.parallel.torch_optimizers import step_clipped, step_told

SIZES = ((33, 65), (65,), (7, 3, 4, 4))


class Walks(TorchDispatchMode):
    """Counts the operations that walk over all gradients."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        self.gradients, self.found = {gradient.data_ptr() for gradient in gradients}, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.found[str(function)] += self.gradients <= {tensor.data_ptr() for tensor in tensors}
        return function(*args, **(kwargs or {}))


class Toy:
    """Parameters with gradients and their AdamW, after a first step, so that there are moments."""

    def __init__(self, scale: float, placed: Callable[[Tensor], Tensor] = torch.clone) -> None:
        generator = torch.Generator().manual_seed(1)
        self.parameters = [nn.Parameter(placed(torch.randn(size, generator=generator))) for size in SIZES]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1, weight_decay=0.1, fused=True)
        for rounds in (1.0, scale):
            for parameter in self.parameters:
                parameter.grad = placed(torch.randn(parameter.shape, generator=generator) * rounds)
            if rounds != scale:
                self.optimizer.step()
        self.gradients = [local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        self.norm = squared_norm(self.gradients).sqrt()

    def state(self) -> list[Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return [local(tensor.detach()).clone() for tensor in (*self.parameters, *moments)]


@pytest.mark.parametrize("scale", [3.0, 1e-4])
def test_the_kernel_clips_as_a_walk_before_it_does_and_walks_once(scale):
    before, inside = Toy(scale), Toy(scale)
    with Walks(before.gradients) as two:
        step_clipped(before.optimizer, before.gradients, before.norm, clip=1.0)
    with Walks(inside.gradients) as one:
        step_told(inside.optimizer, clip_factor(inside.norm, 1.0))
    assert two.found.total() == 2 and one.found.total() == 1, (two.found, one.found)
    for ours, expected in zip(inside.state(), before.state(), strict=True):
        # A division by the factor's inverse rounds once more; gradients that are small enough are divided by exactly 1.
        torch.testing.assert_close(ours, expected, rtol=0 if scale < 1 else 1e-6, atol=0 if scale < 1 else 1e-7)


def test_an_update_that_is_left_out_on_the_device_changes_nothing():
    toy = Toy(3.0)
    before = toy.state()
    step_told(toy.optimizer, clip_factor(toy.norm, 1.0), left_out=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(toy.state(), before, strict=True))
    other = Toy(3.0)
    step_told(toy.optimizer, left_out=torch.zeros(()))
    other.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(toy.state(), other.state(), strict=True))
    assert not torch.equal(toy.parameters[0], before[0])


def test_shards_are_told_as_whole_tensors_are():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded, whole = Toy(3.0, lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])), Toy(3.0)
        for left_out in (0.0, 1.0):
            for toy in (sharded, whole):
                step_told(toy.optimizer, clip_factor(toy.norm, 1.0), torch.full((), left_out))
        assert all(torch.equal(a, b) for a, b in zip(sharded.state(), whole.state(), strict=True))
    finally:
        dist.destroy_process_group()
