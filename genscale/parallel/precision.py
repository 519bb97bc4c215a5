"""Precision of forward and backward. Weights, optimizer state, losses and reductions stay in fp32 in every mode."""

from __future__ import annotations

import contextlib

import torch

from genscale.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, strategy: str, device: torch.device) -> None:
    """Refuse what the device or the strategy cannot do. Raises UserError naming the nearest allowed setting."""
    if precision == "fp16" and strategy not in ("single", "ddp"):
        raise UserError(f"train.precision: fp16 under parallel.strategy {strategy} is not supported (its loss scaler is tested "
                        "for single and ddp only); use train.precision bf16, which needs no scaling")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"train.precision: bf16 is not supported by {name}; use fp16 (parallel.strategy single or ddp) or fp32")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast for strategies whose weights stay in fp32 (single, ddp)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])
