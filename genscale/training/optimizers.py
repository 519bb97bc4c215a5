"""Optimizers with proper parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from genscale.config import OptimizerSettings


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of one network. Matrices and embeddings are decayed, vectors (norms, biases) are not.

    AdamW: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", in torch's fused form, on CPU and GPU alike.
    """
    # ndim of the logical tensor: ZeRO-3 and FSDP2 wrap after this, or keep the logical shape.
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    rest = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    # Fused SGD does not exist for sharded tensors.
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
