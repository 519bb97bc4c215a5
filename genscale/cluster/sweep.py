"""What the runs of an array have come to, side by side: `genscale slurm status --sweep`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from genscale.cluster import slurm_commands
from genscale.cluster.gpu_hours import accounted
from genscale.cluster.job_records import jobs_of, submitted
from genscale.cluster.job_status import Row, aligned, chosen, row_of
from genscale.cluster.slurm_commands import Queued
from genscale.errors import UserError
from genscale.tracking.metrics_file import read_metrics

LOSS = "validation_loss"


@dataclass(frozen=True)
class Member:
    """A run of an array: the settings it differs from the others in, and its latest metrics."""

    row: Row
    settings: Mapping[str, str]
    metrics: Mapping[str, float]


def show(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """genscale slurm status --sweep [RUN ...]. Raises UserError."""
    sweeps = sweeps_of(chosen(folders, arguments, "status --sweep"))
    queue = slurm_commands.queue()
    print("\n\n".join(summary(array, runs, queue) for array, runs in sweeps.items()))
    return 0


def sweeps_of(folders: Sequence[Path]) -> dict[Path, list[Path]]:
    """The runs of every array that the folders are, or belong to. Raises UserError where there is none."""
    found: dict[Path, list[Path]] = {}
    for folder in folders:
        for entry in submitted(folder):
            array = Path(entry.kept).parent.parent
            runs = [Path(run) for each in submitted(array) if each.log is None for run in each.runs]
            if runs:
                found[array] = list(dict.fromkeys(runs))
    if not found:
        raise UserError(f"genscale slurm status --sweep: {', '.join(map(str, folders))} had no array of runs (genscale slurm "
                        "submit --array)")
    return found


def summary(array: Path, runs: Sequence[Path], queue: Sequence[Queued]) -> str:
    """A table of the runs and their final metrics, the best first, and what they come to together."""
    hours = accounted([job for run in runs for job in jobs_of(run)])
    members = [_member(run, queue, hours) for run in runs]
    members.sort(key=lambda each: each.metrics.get(LOSS, math.inf))
    settings = list(dict.fromkeys(key for each in members for key in each.settings))
    metrics = list(dict.fromkeys(name for each in members for name in each.metrics))
    lines = [("RUN", *settings, "STATE", "STEP", *metrics)]
    for each in members:
        lines.append((each.row.run.name, *(each.settings.get(key, "-") for key in settings), each.row.outcome,
                      each.row.progress, *(_number(each.metrics.get(name)) for name in metrics)))
    states = Counter(each.row.outcome for each in members)
    total = sum(each.row.gpu_hours or 0 for each in members)
    head = f"{array}: {len(members)} runs: {', '.join(f'{count} {state}' for state, count in states.items())}"
    return "\n".join([head + (f"; {total:,.1f} GPU hours" if total else ""), aligned(lines), *_over_seeds(members)])


def _member(run: Path, queue: Sequence[Queued], hours: Mapping[str, float]) -> Member:
    settings = next((entry.settings for entry in reversed(submitted(run)) if entry.settings), {})
    return Member(row_of(run, queue, hours), settings, _final(run))


def _final(run: Path) -> dict[str, float]:
    """The latest loss, and all of the latest evaluation."""
    try:
        records = read_metrics(run / "metrics.jsonl")
    except UserError:  # damaged: the row says so
        return {}
    logged: dict[str, Any] = next((each for each in reversed(records) if "step_seconds" in each), {})
    evaluated: dict[str, Any] = next(
        (each for each in reversed(records) if any(name.startswith("validation_") for name in each)), {})
    chosen = {name: value for name, value in logged.items() if name == "loss" or name.endswith("/loss")}
    chosen |= {name: value for name, value in evaluated.items() if name.startswith("validation_")}
    return {name: float(value) for name, value in chosen.items() if isinstance(value, (int, float))}


def _over_seeds(members: Sequence[Member]) -> list[str]:
    """For each combination of the other settings, the mean over its seeds and the spread."""
    groups: dict[str, list[float]] = {}
    for each in members:
        if "run.seed" in each.settings and LOSS in each.metrics:
            others = " ".join(f"{key}={value}" for key, value in each.settings.items() if key != "run.seed")
            groups.setdefault(others, []).append(each.metrics[LOSS])
    return [f"{f'{others}: ' if others else ''}{LOSS} {mean(values):.4f} +- {stdev(values):.4f} over {len(values)} seeds"
            for others, values in groups.items() if len(values) > 1]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"
