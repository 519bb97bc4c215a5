"""Which kind of device a tensor is computed on: that where it lies, or the one that a step is planned for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Kind = Literal["cpu", "gpu"]
_planned: Kind | None = None  # of the process and not of the thread: backwards may run in another


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor is computed on a GPU; in a plan, whether the planned run would."""
    return tensor.is_cuda if _planned is None else _planned == "gpu"


def is_planned() -> bool:
    """Whether the step under way is only planned: its tensors have shapes and no values, so that none may be asked for."""
    return _planned is not None


@contextmanager
def planned_on(kind: Kind) -> Iterator[None]:
    """Inside, what is computed is planned for a device of this kind, on tensors without values."""
    global _planned
    before, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = before
