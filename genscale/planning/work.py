"""What one call of an operation of torch does: which kind it is, its shape, its floating-point operations and its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genscale.parallel.planned import tensors
from genscale.planning.account import Kind

PRODUCTS = {"aten.mm": (0, 1), "aten.addmm": (1, 2), "aten.addmm_": (1, 2), "aten.bmm": (0, 1), "aten.baddbmm": (1, 2),
            "aten._scaled_mm": (0, 1), "aten.mv": (0, 1), "aten.addmv": (1, 2)}
"""Products, and which two arguments they multiply."""
INDEXING = ("embedding", "index", "gather", "scatter", "searchsorted", "sort", "topk", "cumsum", "cummax", "arange")
FREE = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided", "aten.detach",
        "aten.resize_", "aten.set_", "aten.lift_fresh", "aten.alias", "aten._unsafe_view", "aten.is_same_size"}
"""They touch no memory."""
SECOND_PASS = 2.5
"""Backward of attention against its forward: five products for two."""


@dataclass(frozen=True)
class Work:
    """One call; see `genscale.planning.account.Operation`."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    flops: float
    bytes: int


def work_of(operation: Any, args: Sequence[Any], out: Any) -> Work | None:
    """What a call does; None for one that only looks at memory in another way.

    FLOPs of causal attention are counted over the full square, as is the custom, though kernels skip what is masked.
    """
    name = operation._schema.name.replace("::", ".")
    if name in FREE or name.startswith("prim.") or operation.is_view:  # prim.device: what somebody asks a tensor
        return None
    given, made = list(tensors(args)), list(tensors(out))
    if not made and not given:
        return None
    moved = {id(tensor): tensor for tensor in (*given, *made)}
    count = sum(tensor.numel() * tensor.element_size() for tensor in moved.values())
    first = (given or made)[0]
    kind, shape, flops = _measured(name, args, given, made)
    return Work(name, kind, shape, str(_dtype(given, first)).removeprefix("torch."), flops, count)


def _dtype(given: list[Tensor], first: Tensor) -> torch.dtype:
    return next((tensor.dtype for tensor in given if tensor.is_floating_point()), first.dtype)


def _measured(name: str, args: Sequence[Any], given: list[Tensor], made: list[Tensor]) -> tuple[Kind, tuple[int, ...], float]:
    if name in PRODUCTS:
        left, right = (args[place] for place in PRODUCTS[name])
        *batch, rows, inner = left.shape
        columns = right.shape[-1] if right.ndim > 1 else 1
        shape = (*batch, rows, columns, inner)
        return "product", shape, 2.0 * math.prod(shape)
    if "scaled_dot_product" in name or "_flash_attention" in name or "_efficient_attention" in name:
        backward = name.endswith("_backward")
        query, key = args[backward], args[backward + 1]  # backward is given the gradient first
        batch, heads, queries, width = query.shape
        keys = key.shape[2]
        flops = 4.0 * batch * heads * queries * keys * width
        return "attention", (batch, heads, queries, keys, width), flops * (SECOND_PASS if backward else 1)
    if name in ("aten.convolution", "aten._convolution"):
        return _convolution(args[0], args[1], made[0], bool(args[6]), 1)
    if name == "aten.convolution_backward":
        wanted = [bool(each) for each in args[-1][:2]]
        return _convolution(args[1], args[2], args[0], bool(args[7]), sum(wanted))
    shape = tuple(made[0].shape) if len(made) == 1 else ()
    kind: Kind = "other" if any(word in name for word in INDEXING) else "elementwise"
    return kind, shape, float(sum(tensor.numel() for tensor in made))


def _convolution(image: Tensor, weight: Tensor, out: Tensor, transposed: bool,
                 times: int) -> tuple[Kind, tuple[int, ...], float]:
    """Every weight meets every place of the smaller map: the result, or of a transposed convolution what it is given."""
    kernel = weight.shape[2:]
    places = image.shape[2:] if transposed else out.shape[2:]
    channels = (image.shape[1], out.shape[1])
    flops = 2.0 * image.shape[0] * math.prod(places) * weight.numel() * times
    return "convolution", (image.shape[0], *channels, *out.shape[2:], *kernel), flops
