"""What CUDA makes of torch's operations, of tensors on the CPU: a step that is planned for a GPU keeps what a GPU would keep.

Autocast: the CPU's leaves normalisation, resizing, softmax and powers in bf16, where CUDA's computes them in fp32 and so keeps
their input and what follows in fp32. Which operations CUDA casts is asked of the installed torch, every build of which has its
casts; how, is written in torch's header ATen/autocast_mode.h, whose shorter lists stand here (AT_FORALL_LOWER_PRECISION_FP,
_PROMOTE and _FP32_SET_OPT_DTYPE): what is in none of them is in AT_FORALL_FP32.

Kernels: RMS normalisation is one on CUDA (`_fused_rms_norm_cuda`), which keeps its input and a number a row; on the CPU it is
ten, which keep four times as much. Group normalisation brings channels-last images into the other order first, whose copy
is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import _scoped_library, fallthrough_kernel
from torch.utils._pytree import tree_leaves, tree_map

LOWER = {"_convolution", "_cudnn_rnn", "_scaled_dot_product_flash_attention", "_thnn_fused_gru_cell", "_thnn_fused_lstm_cell",
         "addmv", "addr", "chain_matmul", "convolution", "cudnn_convolution", "cudnn_convolution_transpose", "einsum",
         "gru_cell", "linalg_multi_dot", "lstm_cell", "mv", "rnn_relu_cell", "rnn_tanh_cell"}
"""Computed in bf16 or fp16 by CUDA's autocast, and left alone by the CPU's."""
WIDEST = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "index_put", "scatter_add", "tensordot", "vdot"}
"""Computed in fp32 where one of the arguments is."""
RESULT = {"cumprod", "cumsum", "linalg_matrix_norm", "linalg_vector_norm", "log_softmax", "softmax", "sum"}
"""They take the dtype of their result: fp32, of arguments as they are."""


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, `torch.autocast("cpu", ...)` casts what `torch.autocast("cuda", ...)` would, in the whole process; operations on
    tensors without values keep what those of CUDA keep."""
    cuda, cpu = (set(torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{kind}")) for kind in ("CUDA", "CPU"))
    with _scoped_library("aten", "IMPL") as library:
        for name in sorted(cpu - cuda):
            library.impl(name.removeprefix("aten::"), fallthrough_kernel, "AutocastCPU", allow_override=True)
        for name in sorted(cuda - cpu):
            library.impl(name.removeprefix("aten::"), _casting(name.removeprefix("aten::")), "AutocastCPU")
        # With a kernel for the device, autograd takes the operation for one; a tensor without values never gets to the kernel.
        library.impl("_fused_rms_norm", _not_for_values, "CPU")
        library.impl("group_norm", _in_order_of_channels, "AutogradCPU")
        yield


def _in_order_of_channels(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
                          _cudnn: bool = True) -> Tensor:
    rest = math.prod(x.shape[2:])
    return torch.native_group_norm(x.contiguous(), weight, bias, x.shape[0], x.shape[1], rest, groups, eps)[0]


def _not_for_values(*_args: Any) -> Any:
    raise RuntimeError("what is traced as on CUDA has no values")


def _casting(name: str) -> Callable[..., Any]:
    """The operation in the precision that CUDA's autocast gives it."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
            if packet in RESULT:
                if _is_cast(args[0]) and kwargs.get("dtype") is None and not _has_dtype(operation, args):
                    kwargs["dtype"] = torch.float32
                return operation(*args, **kwargs)
            dtype = _dtype_of(packet, args)
            args, kwargs = tree_map(lambda each: each.to(dtype) if _is_cast(each) else each, (args, kwargs))
            return operation(*args, **kwargs)

    return cast


def _dtype_of(packet: str, args: Any) -> torch.dtype:
    lower = torch.get_autocast_dtype("cpu")
    if packet in LOWER:
        return lower
    if packet in WIDEST and all(each.dtype == lower for each in tree_leaves(args) if _is_cast(each)):
        return lower
    return torch.float32


def _is_cast(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _has_dtype(operation: Any, args: Any) -> bool:
    """Whether the caller said of which dtype the result is to be, by place."""
    places = [argument.name for argument in operation._schema.arguments]
    place = places.index("dtype")
    return len(args) > place and args[place] is not None
