"""Optimizers with proper parameter groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.models.network_parts import HasFusedRows, blocks_of
from genscale.settings.config import OptimizerSettings
from genscale.training.muon import Muon


def make_optimizer(module: nn.Module, settings: OptimizerSettings, precision: str = "fp32") -> torch.optim.Optimizer:
    """The optimizer of one network. Matrices and embeddings are decayed, vectors (norms, biases) are not.

    AdamW: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", in torch's fused form, on CPU and GPU alike.
    Muon: for the matrices inside the network's blocks, with that AdamW for all else.

    Args:
        precision: `train.precision`; in fp32 Muon computes in fp32 as well, else in bf16.

    Raises:
        UserError: Muon for a network that has no blocks.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    if settings.name == "muon":
        return _make_muon(module, trained, settings, precision)
    groups = _groups(trained, settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    # Fused SGD does not exist for sharded tensors.
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def _groups(parameters: list[nn.Parameter], settings: OptimizerSettings) -> list[dict]:
    decayed = [p for p in parameters if _ndim(p) >= 2]
    rest = [p for p in parameters if _ndim(p) < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _ndim(parameter: Tensor) -> int:
    # Of the logical tensor, whose shape ZeRO-3 notes when it leaves an empty one in its place.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _make_muon(module: nn.Module, trained: list[nn.Parameter], settings: OptimizerSettings, precision: str) -> Muon:
    hidden = {p for block in blocks_of(module) for p in block.parameters() if p.requires_grad and p.ndim == 2}
    if not hidden:
        raise UserError(f"optimizer.name: muon trains the matrices inside a network's blocks, and {type(module).__name__} has "
                        "none; use adamw")
    rows = {owner.get_parameter(name): parts for owner in module.modules() if isinstance(owner, HasFusedRows)
            for name, parts in owner.fused_rows().items()}
    return Muon([(p, rows.get(p)) for p in trained if p in hidden], lr=settings.lr, weight_decay=settings.weight_decay,
                momentum=settings.muon_momentum, dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
                adamw=_groups([p for p in trained if p not in hidden], settings),
                betas=settings.betas, eps=settings.eps, fused=True)
