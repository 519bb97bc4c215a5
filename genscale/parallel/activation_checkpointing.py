"""Activation checkpointing of a network's blocks, in place, so that parameter names stay what they are.

full: only the input of a block is kept and the block is recomputed in backward (Chen et al. 2016, "Training deep nets with
sublinear memory cost"). selective: the results of matrix products and attention are kept, the cheap rest is recomputed
(Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models"). With full, that input
may wait in host memory: of long sequences the inputs of all blocks are what fills a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from genscale.models.device_kind import is_planned, lies_on_host
from genscale.models.moving_state import MovingState, moving_layers
from genscale.models.spectral_norm import iterate_due

aten = torch.ops.aten
KEPT_OPERATIONS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,  # fp8
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _keep_costly(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks: list[nn.Module], mode: str, compiled: bool = False, offload: bool = False) -> None:
    """Make each block recompute its activations in backward. `mode` is none, full or selective.

    Args:
        offload: what a block was given, and what backward needs to compute it anew, waits in host memory (full alone).
        compiled: the blocks' forwards are to be compiled. A block is then compiled as a whole, with its recomputation inside,
            but for one with layers that must know a second forward from a first, whose forward is compiled here, in pieces.
    """
    # No generator state to preserve: genscale's draws are addressed, not stateful.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        make = partial(create_selective_checkpoint_contexts, _keep_costly)
        options["context_fn"] = make if compiled else partial(_casting_anew, make)
    for block in blocks:
        counting = [layer for layer in moving_layers(block) if layer.counts_forwards]
        if mode == "none" or not counting:
            if mode != "none":
                block.forward = _checkpointed(block.forward, options, offload)
            if compiled:
                block.compile()
            continue
        for layer in counting:
            layer.may_be_recomputed = True
        make = options.get("context_fn", _no_contexts)
        forward = torch.compile(block.forward) if compiled else block.forward
        forward = _checkpointed(forward, {**options, "context_fn": partial(_contexts, make, counting)}, offload)
        block.forward = _iterating_before(block, forward) if compiled else forward


Contexts = tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]


def _no_contexts() -> Contexts:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _contexts(make: Callable[[], Contexts], layers: list[MovingState]) -> Contexts:
    """Contexts of forward and recomputation, in the latter of which the layers know that it is one."""
    forward, backward = make()
    return forward, _Recomputation(backward, layers)


def _casting_anew(make: Callable[[], Contexts]) -> Contexts:
    """Contexts in which autocast keeps no weight that it has cast: of two forwards before one backward the second would take
    the first one's, and do less than its recomputation, which must be the same operations in the same order."""
    forward, backward = make()
    return _CastingAnew(forward), _CastingAnew(backward)


class _CastingAnew:
    def __init__(self, context: contextlib.AbstractContextManager) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        torch.set_autocast_cache_enabled(self._before)


class _Recomputation:
    """Entered anew by every backward through the block: a gradient penalty takes two."""

    def __init__(self, context: contextlib.AbstractContextManager, layers: list[MovingState]) -> None:
        self._context, self._layers = context, layers

    def __enter__(self) -> None:
        self._context.__enter__()
        for layer in self._layers:
            layer.is_recomputed = True

    def __exit__(self, *error: Any) -> None:
        for layer in self._layers:
            layer.is_recomputed = False
        self._context.__exit__(*error)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], offload: bool) -> Callable[..., Any]:
    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Inside, hooks of the checkpoint's own stand above these: they see what it was given, and nothing else.
        hooks: contextlib.AbstractContextManager[object]
        hooks = saved_tensors_hooks(_to_host, _from_host) if offload else contextlib.nullcontext()
        with hooks:
            return checkpoint(forward, *args, **options, **kwargs)

    return recomputing_forward


def _iterating_before(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled forward without the steps of the power iteration, which its recomputation has not either: graphs that differ
    keep what backward needs in different orders."""

    def iterating_forward(*args: Any, **kwargs: Any) -> Any:
        iterate_due(block)
        return forward(*args, **kwargs)

    return iterating_forward


def _to_host(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
    """A copy in host memory, for which nobody waits: what uses it stands behind it in the same stream."""
    if not tensor.requires_grad:  # a mask, which is the same for all blocks
        return None, tensor
    with torch.no_grad():
        host = lies_on_host(torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=tensor.is_cuda))
        return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(kept: tuple[torch.device | None, Tensor]) -> Tensor:
    device, tensor = kept
    return tensor if device is None else tensor.to(device, non_blocking=True, copy=is_planned())
