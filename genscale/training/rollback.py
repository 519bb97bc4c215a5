"""Back to the latest checkpoint in the middle of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, latest_valid
from genscale.checkpoint.restoring import restore_exactly
from genscale.data.loader import StepLoader
from genscale.parallel.engine import Engine
from genscale.supervise.run_folder import set_later_checkpoints_aside
from genscale.training.hooks import RunHooks

log = logging.getLogger("genscale")


class GoBack:
    """What `Trainer` takes to go back: networks, optimizers, averages, data and hooks are then those of a run that has just
    been resumed from the checkpoint.

    Args:
        folder: the run's.
        start: the checkpoint that the run was resumed from, which may be another run's.
    """

    def __init__(self, folder: Path, engine: Engine, loader: StepLoader, hooks: RunHooks, start: Checkpoint | None) -> None:
        self.folder, self.engine, self.loader, self.hooks, self.start = folder, engine, loader, hooks, start

    def __call__(self, left_out: frozenset[int]) -> tuple[int, dict[str, Any]] | None:
        """(step, state of the guard) of the latest valid checkpoint, or None where there is none. Collective."""
        self.hooks.checkpoints.settle_save()
        checkpoint = self.engine.processes.main_does(self._latest)
        if checkpoint is None:
            return None
        state = checkpoint.state()
        restore_exactly(self.engine, checkpoint)
        self.loader.go_back(state["data"], left_out)
        self.hooks.rolled_back(state)
        return state["step"], state.get("guards") or {}

    def _latest(self) -> Checkpoint | None:
        may_commit = self.hooks.checkpoints.saver.may_commit
        if may_commit is not None:  # checkpoints of another run would be moved
            may_commit()
        checkpoint = latest_valid(self.folder / "checkpoints", log.warning)
        if checkpoint is None and self.start is not None and self.start.problem() is None:
            checkpoint = self.start
        if checkpoint is not None:
            set_later_checkpoints_aside(self.folder, checkpoint.step, log.warning)
        return checkpoint
