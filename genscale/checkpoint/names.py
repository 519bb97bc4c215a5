"""How checkpoints are called. For programs that need not load torch to see how far a run has come."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"^step-(\d{8})$")


def latest_step(run_folder: Path) -> int:
    """Step of the run's latest checkpoint, whole or damaged; 0 where there is none."""
    found = [NAME.match(path.name) for path in (run_folder / "checkpoints").glob("step-*")]
    return max((int(match[1]) for match in found if match), default=0)
