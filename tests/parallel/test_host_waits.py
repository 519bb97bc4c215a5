"""The loss of a step never makes the host wait for the device: no number is read from it, and no copy to it blocks.

Networks, batch and draws stand on the meta device, which has no values to read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import genscale
from genscale.families import FAMILIES, family
from genscale.families.gpt.masks import MaskInBlocks
from genscale.rng import Draws

META = torch.device("meta")
VARIANTS = {
    "dcgan": {"objective.augmentation": "[color,translation,cutout]", "model.architecture": "residual",
              "model.generator_norm": "group", "model.discriminator_norm": "none"},
    "vae": {"objective.importance_samples": 2}, "gpt": {"model.dropout": 0.1, "data.separate_documents": True},
}  # fmt: skip


MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class Numbers(TorchFunctionMode):
    """Notes tensors on the device that are made of the host's numbers: a copy that is waited for, and that no dispatch mode
    sees."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function in MAKES and out.is_meta:
            self.found.append(f"{function.__name__} of {args[-1]}")
        return out


class BlockingCopies(TorchDispatchMode):
    """Notes every copy from the host that its caller waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_device = function is torch.ops.aten._to_copy.default and kwargs.get("device") == META and not args[0].is_meta
        copied = function is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta
        if (to_device and not kwargs.get("non_blocking")) or (copied and not (args[2:] or kwargs.get("non_blocking"))):
            self.found.append(f"{tuple(args[-1 if copied else 0].shape)}")
        return function(*args, **kwargs)


def plain(name: str, **settings: Any) -> Any:
    tiny = dict(family(name).tiny)
    return genscale.config(name, {**tiny, "train.precision": "fp32", **settings})


@pytest.mark.parametrize(("name", "settings"), [
    *((name, {}) for name in FAMILIES if "reward" not in name), *VARIANTS.items(), ("vae", {"model.likelihood": "bernoulli"})])
def test_no_loss_waits_for_the_device(name, settings):
    """But for those that are rewarded: who judges what was written must read it."""
    config = plain(name, **settings)
    data = family(name).build_data(config.data, config.run.seed)
    try:
        objective = family(name).build_objective(config, data)
        samples = family(name).validation(config.data, config.run.seed)[:4]
    finally:
        data.close()
    batch = {key: torch.from_numpy(np.stack([sample[key] for sample in samples])).to(META) for key in samples[0]}
    batch["sample"] = torch.arange(len(samples))
    networks = {key: network.to(META) for key, network in objective.networks.items()}
    for phase in objective.phases:
        draws = Draws(1, phase.name, 3, batch["sample"], META)
        with BlockingCopies() as copies, Numbers() as numbers:
            terms = phase.loss(networks, batch, draws)
            sum(value for term, value in terms.items() if term not in phase.statistics).backward()
        assert not copies.found + numbers.found, (phase.name, copies.found, numbers.found)


def test_no_mask_in_blocks_waits_for_the_device():
    with BlockingCopies() as copies:
        MaskInBlocks(300, 100, torch.zeros(2, 300, dtype=torch.int64, device=META), META)
    assert not copies.found


def test_a_copy_that_waits_is_seen():
    with BlockingCopies() as copies:
        torch.ones(3).to(META)
        torch.ones(4).to(META, non_blocking=True)
    assert copies.found == ["(3,)"]
    with Numbers() as numbers:
        torch.ones(3, device=META).new_tensor(2.0)
        torch.tensor(3.0)
    assert numbers.found == ["new_tensor of 2.0"]
