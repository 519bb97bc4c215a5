"""Activation checkpointing of a network's blocks, in place, so that parameter names stay what they are.

full: only the input of a block is kept and the block is recomputed in backward (Chen et al. 2016, "Training deep nets with
sublinear memory cost"). selective: the results of matrix products and attention are kept, the cheap rest is recomputed
(Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from genscale.models.moving_state import moving_layers
from genscale.models.recomputation import recomputing

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
}


def _keep_costly(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_activations(blocks: list[nn.Module], mode: str) -> None:
    """Make each block recompute its activations in backward. `mode` is none, full or selective."""
    if mode == "none":
        return
    # No generator state to preserve: genscale's draws are addressed, not stateful.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_costly)
    for block in blocks:
        own = dict(options)
        # Only for those that ask: torch.compile takes no context but a selective one.
        if any(layer.counts_forwards for layer in moving_layers(block)):
            own["context_fn"] = partial(_contexts, options.get("context_fn", _no_contexts))
        block.forward = _checkpointed(block.forward, own)


Contexts = tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]


def _no_contexts() -> Contexts:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _contexts(make: Callable[[], Contexts]) -> Contexts:
    """Contexts of forward and recomputation, in the latter of which the layers know that it is one."""
    forward, backward = make()
    return forward, _Recomputation(backward)


class _Recomputation:
    """Entered anew by every backward through the block: a gradient penalty takes two."""

    def __init__(self, context: contextlib.AbstractContextManager) -> None:
        self._context = context

    def __enter__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._context)
        self._stack.enter_context(recomputing())

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputing_forward
