"""Cross-entropy of an output layer, computed so that the logits of all tokens never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> Tensor:
    """Nats of all targets together, an fp32 scalar.

    Args:
        hidden: `(tokens, width)`.
        weight: of the output layer, `(vocab_size, width)`.
        targets: `(tokens,)` int64; -1 where there is none.
        chunk: tokens whose logits are held at once; None: all.
    """
    if chunk is None or chunk >= len(hidden):
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-1, reduction="sum")
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
        ctx.types = hidden.dtype, weight.dtype
        with torch.autocast(device, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            grad_hidden = torch.empty_like(rows) if differentiate else None
            grad_weight = torch.zeros(matrix.shape, dtype=torch.float32, device=matrix.device) if differentiate else None
            for start in range(0, len(rows), chunk):
                part, wanted = rows[start:start + chunk], targets[start:start + chunk, None]
                logits = (part @ matrix.T).float()
                valid, at = wanted >= 0, wanted.clamp(min=0)
                normaliser = logits.logsumexp(-1, keepdim=True)
                total += (normaliser - logits.gather(1, at)).mul_(valid).sum()
                if differentiate:
                    # d nats / d logits = softmax - one-hot, in the place of the logits.
                    error = logits.sub_(normaliser).exp_().scatter_add_(1, at, -valid.float()).mul_(valid).to(dtype)
                    torch.mm(error, matrix, out=grad_hidden[start:start + chunk])
                    _add_product(grad_weight, error, part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_type, weight_type = ctx.types
        # In place, for there is one backward pass; the matrix is as large as the embedding table.
        return (grad_hidden * grad).to(hidden_type), grad_weight.mul_(grad).to(weight_type), None, None, None


def _add_product(total: Tensor, error: Tensor, part: Tensor) -> None:
    """total += error.T @ part, added up in fp32."""
    if error.dtype == torch.float32:
        total.addmm_(error.T, part)
    elif error.is_cuda:
        total.add_(torch.mm(error.T, part, out_dtype=torch.float32))
    else:
        total.add_(error.T @ part)
