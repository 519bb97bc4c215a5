"""A sharded network is held whole for a while, so that its forwards need no other process."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from genscale.parallel.precision import DTYPES

SHARE = 0.5
"""Of the memory that is free, what a gathered network may take: activations and keys and values need room beside it."""


@contextmanager
def without_hooks(module: nn.Module, library: str) -> Iterator[None]:
    """Inside, forwards of the module leave out the hooks of a library (its modules' names begin so): those that gather and give
    back, and that note in which order, so that backwards fetch ahead, which must be the same on every process."""
    kept = [(layer, layer._forward_pre_hooks, layer._forward_hooks) for layer in module.modules()]
    for layer, before, after in kept:
        layer._forward_pre_hooks = _but(before, library)
        layer._forward_hooks = _but(after, library)
    try:
        yield
    finally:
        for layer, before, after in kept:
            layer._forward_pre_hooks, layer._forward_hooks = before, after


def _but(hooks: dict[int, Any], library: str) -> OrderedDict[int, Any]:
    return OrderedDict((number, hook) for number, hook in hooks.items()
                       if not (getattr(hook, "__module__", None) or "").startswith(library))


@contextmanager
def inputs_cast(modules: Sequence[nn.Module], precision: str) -> Iterator[None]:
    """Inside, the modules take numbers in the precision of their weights."""
    handles = [] if precision == "fp32" else [
        module.register_forward_pre_hook(cast_inputs(precision), prepend=True, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cast_inputs(precision: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, Any]]:
    """A forward pre-hook: numbers in fp32 (images, noise) that meet weights in bf16."""
    def cast(value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(DTYPES[precision]) if is_wide else value

    return lambda _module, args, kwargs: (tuple(cast(value) for value in args),
                                          {key: cast(value) for key, value in kwargs.items()})


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many more bytes may be taken of this process's memory: at most half of what is free on its GPU, or of its
    share of what is free on this machine."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return needed <= SHARE * free
