"""A fault in one rank of a real run. Python runs this file at the start of every process that has this folder on its path.

PLANTED_FAULT: raise (an error of ours), or nan (the loss of a backward pass); once, in step PLANTED_STEP of rank PLANTED_RANK.
"""

from __future__ import annotations

import os
from typing import Any


def plant(fault: str, at: int) -> None:
    from genscale.parallel.fsdp2 import ShardedEngine
    from genscale.parallel.replicated import ReplicatedEngine
    from genscale.parallel.zero import ZeroEngine
    from genscale.training.trainer import Trainer

    pending = [False]
    train_step = Trainer.train_step

    def step_with_fault(self: Trainer, step: int, *arguments: Any) -> Any:
        if step == at and not hasattr(self, "planted"):
            self.planted = True
            if fault == "raise":
                raise RuntimeError("planted error")
            pending[0] = True
        return train_step(self, step, *arguments)

    Trainer.train_step = step_with_fault
    for engine in (ReplicatedEngine, ZeroEngine, ShardedEngine):
        def backward(self: Any, name: str, loss: Any, whole: Any = engine.backward) -> None:
            factor, pending[0] = float("nan") if pending[0] else 1.0, False
            whole(self, name, loss * factor)

        engine.backward = backward


if "PLANTED_FAULT" in os.environ and os.environ.get("RANK") == os.environ["PLANTED_RANK"]:
    plant(os.environ["PLANTED_FAULT"], int(os.environ["PLANTED_STEP"]))
