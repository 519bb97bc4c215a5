"""Which kind of device a tensor is computed on: that where it lies, or the one that a step is planned for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

Kind = Literal["cpu", "gpu"]
_planned: Kind | None = None  # of the process and not of the thread: backwards may run in another
_compiled = False
_lies_on_host: Callable[[Tensor], None] | None = None


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor is computed on a GPU; in a plan, whether the planned run would."""
    return tensor.is_cuda if _planned is None else _planned == "gpu"


def is_compiled(block: nn.Module) -> bool:
    """Whether the block's forwards are compiled; in a plan, whether those of the planned run would be."""
    return block._compiled_call_impl is not None if _planned is None else _compiled


def is_planned() -> bool:
    """Whether the step under way is only planned: its tensors have shapes and no values, so that none may be asked for."""
    return _planned is not None


def lies_on_host(tensor: Tensor) -> Tensor:
    """The tensor, which a step keeps in host memory: in a plan, where all tensors are on one device, that is noted."""
    if _lies_on_host is not None:
        _lies_on_host(tensor)
    return tensor


@contextmanager
def planned_on(kind: Kind, on_host: Callable[[Tensor], None] | None = None, compiled: bool = False) -> Iterator[None]:
    """Inside, what is computed is planned for a device of this kind, on tensors without values; `on_host` is told of those that
    a step would keep in host memory. Compiled: the planned run's blocks are; what is planned is not."""
    global _planned, _lies_on_host, _compiled
    before = _planned, _lies_on_host, _compiled
    _planned, _lies_on_host, _compiled = kind, on_host, compiled
    try:
        yield
    finally:
        _planned, _lies_on_host, _compiled = before
