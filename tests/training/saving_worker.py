"""Two processes that save checkpoints together, and whose disk fails; run by test_saving.py."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.checkpoint.saving import Contents, Saver
from genscale.checkpoint.writing import clear_leftovers, write_checkpoint
from genscale.errors import UserError
from genscale.parallel.pieces import Piece, pieces_of
from genscale.parallel.processes import Processes

ROWS = 40_001


def state_at(step: int) -> dict[str, Any]:
    return {"step": step, "data": {"batches": 0, "cursors": {}}, "scalers": {}, "plan": {}}


def whole_at(step: int) -> dict[str, Tensor]:
    return {"sharded": torch.arange(ROWS * 3.0).view(ROWS, 3) + step, "bias": torch.full((7,), float(step)),
            "count": torch.tensor(step)}


def pieces_at(step: int, rank: int) -> list[Piece]:
    """The first of two processes has a third of the rows of `sharded`, the other the rest; the others are dealt out."""
    whole = whole_at(step)
    sharded, rows = whole.pop("sharded"), ROWS // 3
    own, first = (sharded[:rows], 0) if rank == 0 else (sharded[rows:], rows * 3)
    return [Piece("sharded", tuple(sharded.shape), first, own), *pieces_of(whole.items(), rank, 2)]


def contents(step: int, last: bool = False) -> Contents:
    return Contents(step, state_at(step), "run: {}\n", {"position": "nowhere"}, best_step=None, last=last)


def main(folder: Path) -> None:
    processes = Processes()
    rank, results = processes.rank, {}
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("genscale").addHandler(handler)
    saver = Saver(folder, processes, keep=2)

    def save(step: int, last: bool = False) -> bool | None:
        pieces = pieces_at(step, rank)
        saver.start({"networks/gpt": pieces, "optimizers/gpt": pieces}, contents(step, last))
        for piece in pieces:  # training goes on
            piece.values.zero_()
        return saver.settle()

    results["saved"] = save(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    results["failed"], results["warnings"] = save(20), list(warnings)
    try:
        save(30, last=True)
    except UserError as error:
        results["last"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    results["after"] = [path.name for path in sorted(folder.iterdir())]
    processes.gather(rank)  # both have looked, before either begins the next
    results["mended"] = save(40)
    if rank == 0:
        alone = write_checkpoint(folder.parent / "alone", 40, {"networks/gpt": whole_at(40), "optimizers/gpt": whole_at(40)},
                                 state_at(40), "run: {}\n")
        made = Checkpoint(folder / "step-00000040")
        results["problem"], results["alike"] = made.problem(), alone.digest() == made.digest()
        results["files"] = sorted(made.manifest()["files"])
    (folder.parent / f"rank-{rank}.json").write_text(json.dumps(results))
    # The other process is killed before it has told that its part is written.
    if rank == 1:
        processes.main_does(lambda: None)  # is told of the partial folder, as at every start of a save
        os.kill(os.getpid(), signal.SIGKILL)
    saver.start({"networks/gpt": pieces_at(50, rank)}, contents(50))
    started = time.monotonic()
    saver.finish()
    results["seconds"], results["killed"] = time.monotonic() - started, [path.name for path in sorted(folder.iterdir())]
    clear_leftovers(folder)
    results["cleared"] = [path.name for path in sorted(folder.iterdir())]
    results["problems"] = [checkpoint.problem() for checkpoint in list_checkpoints(folder)]
    (folder.parent / "rank-0.json").write_text(json.dumps(results))
    os._exit(0)  # no process group to close: the other is gone


if __name__ == "__main__":
    main(Path(sys.argv[1]))
