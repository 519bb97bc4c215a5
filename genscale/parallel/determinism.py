"""`run.deterministic`: the same numbers bit for bit each time, on a GPU too."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from genscale.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Work spaces with which cuBLAS adds up in the same order each time; the first is the faster one."""
_REFUSAL = re.compile(r"^(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, only operations that give the same bits each time are let through; to be entered before CUDA starts.

    Raises:
        UserError: CUDA has started without what it takes, or an operation inside has no deterministic form (it is named).
    """
    if not wanted:
        yield
        return
    _settle_workspace()
    cudnn = torch.backends.cudnn
    fill: Any = torch.utils.deterministic  # whose attribute is one of a class that is put in the place of the module
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    fill.fill_uninitialized_memory = False  # it costs a write of every new tensor, and nothing here reads before it writes
    try:
        yield
    except RuntimeError as error:
        refused = _REFUSAL.match(str(error))
        if refused is None:
            raise
        raise UserError(f"run.deterministic: true, but {refused[1]} has no deterministic form here; set it to false, or choose "
                        "a model or objective without this operation") from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before[2:]


def _settle_workspace() -> None:
    value = os.environ.get(WORKSPACE)
    if value is None and torch.cuda.is_initialized():
        raise UserError(f"run.deterministic: true, but CUDA has started without {WORKSPACE}; set "
                        f"{WORKSPACE}={WORKSPACES[0]} in the environment")
    if value is not None and value not in WORKSPACES:
        raise UserError(f"run.deterministic: true, but {WORKSPACE} is '{value}', with which cuBLAS may add up in another order "
                        f"each time; set it to {' or '.join(WORKSPACES)}, or leave it out")
    os.environ.setdefault(WORKSPACE, WORKSPACES[0])
