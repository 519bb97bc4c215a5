"""Which checkpoints are kept."""

from __future__ import annotations

from pathlib import Path

from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.checkpoint.writing import clear_leftovers, delete


def prune(folder: Path, keep: int, best_step: int | None, keep_every: int = 0) -> None:
    """Delete all but the last `keep` checkpoints, the best, and those of every `keep_every`-th step, and what killed writers
    left behind. One that lacks a file, or a part of one, does not count: the last `keep` that have all their files are never
    deleted.
    """
    clear_leftovers(folder)
    intact = 0
    for checkpoint in reversed(list_checkpoints(folder)):
        if intact < keep:
            intact += checkpoint.has_its_files()
        elif checkpoint.step != best_step and not (keep_every and checkpoint.step % keep_every == 0):
            delete(checkpoint.path)
