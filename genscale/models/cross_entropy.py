"""Cross-entropy of an output layer, computed so that the logits of all tokens never exist at once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.models.device_kind import is_planned, on_gpu

log = logging.getLogger("genscale")
CPU_LOGITS, GPU_LOGITS = 2**24, 2**29
"""Logits held at once by default: 64 MiB of fp32 stay near a CPU's caches; a GPU wants large products."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Nats of all targets together, an fp32 scalar.

    Args:
        hidden: `(tokens, width)`.
        weight: of the output layer, `(vocab_size, width)`.
        targets: `(tokens,)` int64; -1 where there is none.
        chunk: tokens whose logits are held at once (default: by the device).
    """
    plain = (chunk or 0) >= len(hidden)
    chunk = chunk or max(1, (GPU_LOGITS if on_gpu(hidden) else CPU_LOGITS) // len(weight))
    # One chunk of our own holds half of what torch's loss does; on a CPU, where chunks are small, torch's kernel is the faster.
    if plain or (chunk >= len(hidden) and not on_gpu(hidden)):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-1, reduction="sum")
    chunk = min(chunk, len(hidden))
    if on_gpu(hidden):  # as many chunks, of about one size, lest the last be a small product
        chunk = -(-len(hidden) // -(-len(hidden) // chunk))
    return _Chunked.apply(hidden, weight, targets, chunk, torch.is_grad_enabled())


class _Chunked(torch.autograd.Function):
    """The gradient is made in the forward pass, while a chunk's logits are at hand (as Liger Kernel does: Hsu et al. 2024).

    The loss is a plain sum, so its gradient is known up to the factor that backward brings; the products are the three of the
    usual way, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, differentiate: bool) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            grad_hidden = torch.empty_like(rows) if differentiate else None
            grad_weight = torch.empty(matrix.shape, dtype=torch.float32, device=hidden.device) if differentiate else None
            # Buffers for all chunks: memory that is new each time costs a CPU as much as the arithmetic.
            raw = torch.empty((chunk, len(matrix)), dtype=dtype, device=hidden.device)
            probabilities = None if on_gpu(hidden) else torch.empty((chunk, len(matrix)))
            for start in range(0, len(rows), chunk):
                part, wanted = rows[start:start + chunk], targets[start:start + chunk, None]
                logits = torch.mm(part, matrix.T, out=raw[:len(part)])
                if probabilities is None:
                    nats, error = _fused()(logits, wanted)
                else:
                    nats, error = _nats_and_error(logits, wanted, probabilities[:len(part)])
                total += nats
                if grad_hidden is not None and grad_weight is not None:
                    torch.mm(error, matrix, out=grad_hidden[start:start + chunk])
                    _add_product(grad_weight, error, part, first=start == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.types = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        # In place, for there is one backward pass; the matrix is as large as the embedding table.
        return (grad_hidden * grad).to(hidden_type), grad_weight.mul_(grad).to(weight_type), None, None, None


def _nats_and_error(raw: Tensor, wanted: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The nats of a chunk together, and their derivative by its logits: softmax minus one-hot.

    Args:
        raw: the logits, `(chunk, vocab_size)`, which may be overwritten.
        wanted: `(chunk, 1)`, -1 where there is no target.
        probabilities: a buffer of the same shape, in fp32.
    """
    valid, at = wanted >= 0, wanted.clamp(min=0)
    chosen, highest = raw.gather(1, at).float(), raw.amax(-1, keepdim=True).float()
    if raw.dtype == torch.float32:
        torch.softmax(raw, -1, out=probabilities)
    else:
        torch.softmax(probabilities.copy_(raw), -1, out=probabilities)
    # The likeliest token's probability is at least 1 / vocab_size, so its logarithm loses nothing.
    normaliser = highest - probabilities.amax(-1, keepdim=True).log()
    nats = (normaliser - chosen).mul_(valid).sum()
    probabilities.scatter_add_(1, at, -valid.float())
    if is_planned() or not valid.all():
        probabilities.mul_(valid)
    return nats, probabilities if raw.dtype == torch.float32 else raw.copy_(probabilities)


def _in_one_pass(raw: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The same in operations that a compiler makes two walks through the logits of: one for the normaliser, and one that puts
    the derivative in their place. No second buffer, and nothing that a GPU's host would have to wait for."""
    valid = wanted >= 0
    logits = raw.float()
    highest = logits.amax(-1, keepdim=True)
    total = (logits - highest).exp().sum(-1, keepdim=True)
    chosen = torch.arange(raw.shape[1], device=raw.device) == wanted
    nats = ((highest + total.log() - raw.gather(1, wanted.clamp(min=0)).float()) * valid).sum()
    return nats, raw.copy_((((logits - highest).exp() / total - chosen.float()) * valid).to(raw.dtype))


def _fused() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`_in_one_pass` compiled; as it is where there is no compiler for the device."""
    return _two_walks if is_planned() else _compiled()


def _two_walks(raw: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """What the compiled form reads and writes, for a plan, which no compiler takes part in."""
    return raw.amax(-1, keepdim=True).float().sum(), raw.mul_(1)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    compiled = torch.compile(_in_one_pass, dynamic=False)

    def fused(raw: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal compiled
        try:
            return compiled(raw, wanted)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            log.warning("the loss is computed in several passes, for torch.compile fails here (%s)", reason)
            compiled = _in_one_pass
            return compiled(raw, wanted)

    return fused


def _add_product(total: Tensor, error: Tensor, part: Tensor, first: bool) -> None:
    """total += error.T @ part, added up in fp32; the first is stored, for `total` is still empty."""
    if error.dtype == torch.float32:
        total.addmm_(error.T, part, beta=0 if first else 1)
    else:
        product = torch.mm(error.T, part, out_dtype=torch.float32) if on_gpu(error) else error.T @ part
        total.copy_(product) if first else total.add_(product)
