"""The jobs of runs: where they are, what the runs have come to, and when they will be done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from genscale.checkpoint.code_version import in_words
from genscale.checkpoint.names import latest_step
from genscale.cluster import slurm_commands
from genscale.cluster.gpu_hours import accounted, gpu_hours
from genscale.cluster.job_records import jobs_of, runs_of, training_steps
from genscale.cluster.lives import Life, read_ended, read_lives
from genscale.cluster.site import read_site
from genscale.cluster.slurm_commands import Queued
from genscale.cluster.why_ended import log_of, why_ended
from genscale.errors import UserError
from genscale.printable import printable
from genscale.settings.config import RunSettings
from genscale.tracking.metrics_file import read_metrics
from genscale.tracking.progress import figure

LONGEST = 1e9
"""Seconds that are predicted at most: thirty years."""
RECENT = 20
"""Logged steps that the speed is a mean of."""
HEADINGS = ("RUN", "JOB", "STATE", "LIVES", "STEP", "LOSS", "SPEED", "GPU HOURS", "TIME LEFT", "PREDICTED END", "CODE", "NOTE")


@dataclass(frozen=True)
class Row:
    """What is to know of a run and its latest job; None where there is nothing.

    Attributes:
        speed: units a second, with the unit.
        time_left: of this life of the job.
        gpu_hours: of all lives.
        code: that the latest life ran, in words.
        predicted: seconds until the last step at the present speed, waits in the queue not counted.
    """

    run: Path
    job: str | None
    state: str
    lives: int
    step: int
    steps: int | None
    loss: float | None
    speed: str | None
    time_left: str | None
    predicted: float | None
    note: str
    gpu_hours: float | None = None
    code: str = ""

    @property
    def progress(self) -> str:
        return f"{self.step}/{self.steps}" if self.steps else str(self.step)

    @property
    def outcome(self) -> str:
        """The state, or how it ended, in a word or two."""
        return re.split("[:;]", self.note)[0] if self.state == "ended" else self.state


def show(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """genscale slurm status [RUN ...]. Raises UserError."""
    runs = runs_of(chosen(folders, arguments, "status"))
    jobs, hours = slurm_commands.queue(), accounted([job for run in runs for job in jobs_of(run)])
    print(table([row_of(run, jobs, hours) for run in runs]))
    return 0


def chosen(folders: Sequence[Path], arguments: Sequence[str], action: str) -> list[Path]:
    """The folders given, or all that have had a job in runs/ here and on the site's scratch disk."""
    if arguments:
        raise UserError(f"genscale slurm {action}: takes run folders, not '{arguments[0]}'")
    found = list(folders)
    if not found:
        scratch, runs = read_site().scratch_folder(), RunSettings().dir
        places = [Path(runs), *([Path(scratch) / runs] if scratch else [])]
        found = sorted({path.parent.parent for place in places for path in place.glob("*/jobs/*.json")})
        if not found:
            searched = " or ".join(f"{place}/" for place in places)
            raise UserError(f"genscale slurm {action}: no run in {searched} has a job; name a run folder")
    for folder in found:
        if not (folder / "jobs").is_dir():
            raise UserError(f"{folder}: no job was submitted for it" if folder.is_dir() else f"{folder}: no such run folder")
    return found


def row_of(run: Path, jobs: Sequence[Queued], hours: Mapping[str, float] | None = None) -> Row:
    """What is to know of a run.

    Args:
        jobs: the queue.
        hours: GPU hours by job, where Slurm's accounting has them.
    """
    numbers, lives, (metrics, damage) = jobs_of(run), read_lives(run), _metrics(run)
    job = next((each for each in jobs if each.job in numbers), None)
    number = job.job if job else numbers[-1] if numbers else None
    state, note = _state(run, job, [life for life in lives if life.job == number], number)
    note = "; ".join(filter(None, (note, damage)))
    logged = [line for line in metrics if _is_number(line.get("step_seconds"))]
    steps, step = training_steps(run), max(latest_step(run), logged[-1]["step"] if logged else 0)
    predicted = None
    if job and logged and steps and step < steps:
        recent = [line["step_seconds"] for line in logged[-RECENT:]]
        predicted = max(0.0, min(sum(recent) / len(recent) * (steps - step), LONGEST))
    return Row(run, number, state, len(lives), step, steps, _loss(metrics), _speed(logged),
               job.time_left if job and job.state == "RUNNING" else None, predicted, note,
               gpu_hours(run, hours or {}, job.job if job and job.state != "PENDING" else None),
               in_words(lives[-1].commit, lives[-1].snapshot) if lives else "")


def _state(run: Path, job: Queued | None, lives: Sequence[Life], number: str | None) -> tuple[str, str]:
    """In a word, and a note on it."""
    if job is not None:
        if job.state == "PENDING":
            ill = lives and lives[-1].how not in (None, "stopped", "complete")
            held = "held" in job.reason.lower() and "admin" not in job.reason.lower()
            release = f"; once you know why: genscale slurm release {shlex.quote(str(run))}" if held else ""
            after = f"; after {_how(lives[-1])}" if ill else ""
            return ("requeued" if lives else "queued"), f"{job.reason}{after}{release}"
        return job.state.lower(), job.nodes
    if lives and lives[-1].how and not lives[-1].goes_on:
        last = lives[-1]
        return "ended", _how(last) if last.how == "complete" else \
            "; ".join(filter(None, (_how(last), last.stop, _where(run, last.job))))
    ended = read_ended(run)
    if ended and ended.get("how") == "complete":
        return "ended", "complete"
    slurm, why = (slurm_commands.last_state(number) if number else None) or ("Slurm has forgotten the job", "")
    state = slurm.lower().replace("_", " ")
    # A job that could not even open its log has left no other word than Slurm's.
    reason = why or why_ended(run, number, None, None) if number and slurm not in ("COMPLETED", "CANCELLED") else None
    return "ended", "; ".join(filter(None, (f"{state}{f': {reason}' if reason else ''}", number and _where(run, number))))


def _how(life: Life) -> str:
    return f"{life.how}{f': {life.reason}' if life.reason and life.how != 'complete' else ''}"


def _where(run: Path, job: str) -> str | None:
    """To read on."""
    log = log_of(run, job)
    return f"see {log}" if log and log.is_file() else None


def _metrics(run: Path) -> tuple[list[dict[str, Any]], str]:
    """And what is wrong with them: it must not keep the other runs from being shown."""
    try:
        return read_metrics(run / "metrics.jsonl"), ""
    except UserError as error:
        return [], str(error)


def _loss(metrics: Sequence[dict]) -> float | None:
    """The latest; of several phases that of the first."""
    for line in reversed(metrics):
        for name, value in line.items():
            if (name == "loss" or name.endswith("/loss")) and _is_number(value):
                return value
    return None


def _speed(logged: Sequence[dict]) -> str | None:
    for name, value in logged[-1].items() if logged else ():
        if name.endswith("_per_second") and name != "tflops_per_second" and _is_number(value):
            return f"{value:,.0f} {name.removesuffix('_per_second')}/s"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e15


def table(rows: Sequence[Row]) -> str:
    """Aligned columns; the note comes last, since it may be long."""
    lines = [HEADINGS]
    for row in rows:
        end = f"{datetime.now() + timedelta(seconds=row.predicted):%a %d %b %H:%M}" if row.predicted is not None else "-"
        lines.append((str(row.run), row.job or "-", row.state, str(row.lives), row.progress,
                      "-" if row.loss is None else figure(row.loss), row.speed or "-",
                      "-" if row.gpu_hours is None else f"{row.gpu_hours:,.1f}", row.time_left or "-", end,
                      row.code or "-", row.note))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells each, in columns."""
    lines = [tuple(map(printable, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
