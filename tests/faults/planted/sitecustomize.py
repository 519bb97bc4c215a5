"""A fault in one rank of a real run. Python runs this file at the start of every process that has this folder on its path.

PLANTED_FAULT: raise (an error of ours), nan (the loss of a backward pass), or spike (the terms of a loss, a million times what
they are); once, in step PLANTED_STEP of rank PLANTED_RANK. Or memory: that rank has 400 MiB left as training begins.
"""

from __future__ import annotations

import dataclasses
import os
import resource
from typing import Any

MEMORY = 400 * 2**20


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
    if fault == "spike":
        plant_spike(pending)
        return
    for engine in (ReplicatedEngine, ZeroEngine, ShardedEngine):
        def backward(self: Any, name: str, loss: Any, whole: Any = engine.backward) -> None:
            factor, pending[0] = float("nan") if pending[0] else 1.0, False
            whole(self, name, loss * factor)

        engine.backward = backward


def plant_spike(pending: list[bool]) -> None:
    from genscale.training.trainer import Trainer

    accumulate = Trainer._accumulate

    def with_spike(self: Trainer, phase: Any, *arguments: Any, **options: Any) -> Any:
        if pending[0]:
            pending[0], loss = False, phase.loss
            phase = dataclasses.replace(phase, loss=lambda *given: {name: term * 1e6 for name, term in loss(*given).items()})
        return accumulate(self, phase, *arguments, **options)

    Trainer._accumulate = with_spike


def limit_memory() -> None:
    """The limit is set as training begins: what torch itself takes differs from machine to machine."""
    from genscale.training.trainer import Trainer

    run = Trainer.run

    def limited(self: Trainer, *arguments: Any) -> Any:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return run(self, *arguments)

    Trainer.run = limited


if "PLANTED_FAULT" in os.environ and os.environ.get("RANK") == os.environ["PLANTED_RANK"]:
    if os.environ["PLANTED_FAULT"] == "memory":
        limit_memory()
    else:
        plant(os.environ["PLANTED_FAULT"], int(os.environ["PLANTED_STEP"]))
