"""How an update is judged in the middle of DeepSpeed's optimizer step, which shows nothing of it.

DeepSpeed leaves an update out where the norm of its gradients is no number, and then clears what it has kept of them. So its
question for the norm is answered by us: with the truth, or with no number where the update is to be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

INVALID = -1.0
"""DeepSpeed's own word for a norm that is none."""


@contextmanager
def judging(optimizer: Any, stage: int, leave_out: Callable[[Tensor], bool]) -> Iterator[None]:
    """Inside, the optimizer's step shows `leave_out` the global norm of its gradients, and makes no update where the answer is
    yes.

    Raises:
        RuntimeError: DeepSpeed did not ask for the norm, or made an update that was to be left out.
    """
    method, answer = _question(optimizer, stage)
    original = getattr(optimizer, method)
    checks = getattr(optimizer, "check_grad_overflow", None)
    verdicts: list[bool] = []

    def judged(*args: Any, **kwargs: Any) -> Any:
        measured = original(*args, **kwargs)
        if verdicts:  # asked again, for other ends
            return measured
        norm, invalid = answer(measured)
        verdicts.append(leave_out(norm))
        if not verdicts[0]:
            return measured
        if checks is not None:
            optimizer.check_grad_overflow = True  # in bf16 it does not look at the norm otherwise
        return invalid

    setattr(optimizer, method, judged)
    if checks is not None:
        optimizer.check_grad_overflow = False  # in bf16 it would look at every gradient first, and not ask for the norm
    try:
        yield
    finally:
        delattr(optimizer, method)
        if checks is not None:
            optimizer.check_grad_overflow = checks
    if not verdicts or (verdicts[0] and not optimizer.overflow):
        raise RuntimeError("DeepSpeed did not ask for the norm of the gradients, or made an update that was to be left out")


def _question(optimizer: Any, stage: int) -> tuple[str, Callable[[Any], tuple[Tensor, Any]]]:
    """The method that the optimizer asks for the norm or what it is of, and what makes (norm, invalid answer) of its answer."""
    if stage == 3:
        return "_get_norm_groups", _of_groups
    if hasattr(optimizer, "scaled_global_norm"):
        return "scaled_global_norm", _of_norm
    return "get_grads_for_norm", lambda gradients: _of_gradients(optimizer, gradients)  # stage 1 in bf16


def _of_norm(norm: Tensor) -> tuple[Tensor, Tensor]:
    return norm, torch.full_like(norm, INVALID)


def _of_groups(norms: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    from deepspeed.runtime.utils import combine_grad_norm_groups

    norm = combine_grad_norm_groups(norms)
    return norm, [torch.full_like(norm, INVALID)]


def _of_gradients(optimizer: Any, gradients: tuple[list[Tensor], Any]) -> tuple[Tensor, tuple[list[Tensor], Any]]:
    from deepspeed.runtime.utils import get_global_norm_of_tensors

    dense, experts = gradients
    norm = get_global_norm_of_tensors(dense, norm_type=optimizer.norm_type, mpu=optimizer.mpu)
    return norm, ([torch.full_like(dense[0], torch.nan)], experts)
