"""Precision of forward and backward. Weights, optimizer state, losses and reductions stay in fp32 in every mode."""

from __future__ import annotations

import contextlib
import importlib.util

import torch
from torch import nn

from genscale.errors import UserError

# Of fp8: the dtype of all that is no matrix product of a block.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def native_precision(on_cpu: bool) -> str:
    """What `train.precision: auto` means here: bf16 where the device has instructions for it, else fp32."""
    if on_cpu:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def keep_fp32() -> None:
    """Have convolutions in fp32 computed in fp32, as matrix products are: cuDNN otherwise rounds their input (TF32)."""
    torch.backends.cudnn.allow_tf32 = False


def allow_tf32() -> None:
    """Have products and convolutions in fp32 round what they multiply to TF32 (`train.tf32`)."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast for strategies whose weights stay in fp32 (single, ddp)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def check_float8(on_cpu: bool) -> None:
    """Raise UserError where fp8 cannot be had: it takes a GPU of compute capability 9.0 (Hopper) and torchao."""
    if on_cpu:
        raise UserError("train.precision: fp8 needs an NVIDIA GPU of the Hopper generation or newer, and this run computes on "
                        "the CPU; use bf16 or fp32")
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        raise UserError(f"train.precision: fp8 needs an NVIDIA GPU of the Hopper generation or newer, not "
                        f"{torch.cuda.get_device_name()}; use bf16")
    if importlib.util.find_spec("torchao") is None:
        raise UserError("train.precision: fp8 needs torchao, which is not installed; pip install 'genscale[fp8]', or use bf16")


def use_float8(blocks: list[nn.Module]) -> None:
    """Make the blocks' linear layers multiply in fp8 with one scale a tensor (Micikevicius et al. 2022, "FP8 formats for deep
    learning"), in place; names and fp32 weights stay. Layers whose sizes are no multiples of 16 stay as they are."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Padded where the number of tokens is no multiple of 16: it is the inner dimension of the weight gradient's product.
    config = Float8LinearConfig(pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_fits_float8, config=config)


def _fits_float8(module: nn.Module, _name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0
