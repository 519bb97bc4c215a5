"""What runs have cost: GPU hours over all of their lives, from Slurm's accounting, or else from lives.json."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from genscale.cluster import slurm_commands
from genscale.cluster.job_records import jobs_of
from genscale.cluster.lives import Life, read_lives


def accounted(jobs: Iterable[str]) -> dict[str, float]:
    """GPU hours of those jobs that Slurm's accounting knows, in all of their lives; none where it keeps none, or no GPUs."""
    jobs = list(jobs)
    if not jobs or shutil.which("sacct") is None:
        return {}
    # A requeued job is in there once for each life: its duplicates.
    done = slurm_commands.ask("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates",
                              "--format=JobID,ElapsedRaw,AllocTRES", f"--jobs={','.join(jobs)}")
    hours: dict[str, float] = {}
    for line in done.stdout.splitlines() if not done.returncode else ():
        job, elapsed, resources = (*line.split("|"), "", "")[:3]
        if (gpus := _gpus_in(resources)) and elapsed.isdigit():
            hours[job] = hours.get(job, 0) + gpus * int(elapsed) / 3600
    return hours


def _gpus_in(resources: str) -> int:
    """`billing=8,cpu=64,gres/gpu=8,gres/gpu:a100=8,node=1` has 8; a cluster may count them by kind alone."""
    counts = {kind: int(count) for kind, count in re.findall(r"(?:^|,)gres/gpu(:[^=,]+)?=(\d+)", resources)}
    return counts[""] if "" in counts else sum(counts.values())


def gpu_hours(run: Path, known: Mapping[str, float], running: str | None) -> float | None:
    """The GPU hours of a run; None where it has had no GPU.

    Args:
        known: hours by job, from the accounting.
        running: the job that has the run now.
    """
    lives, hours = read_lives(run), 0.0
    for job in jobs_of(run):
        hours += known[job] if job in known else sum(_of_life(run, life, running) for life in lives if life.job == job)
    return hours or None


def _of_life(run: Path, life: Life, running: str | None) -> float:
    with contextlib.suppress(ValueError, TypeError):
        began = datetime.fromisoformat(life.began)
        if life.ended is not None:
            ended = datetime.fromisoformat(life.ended)
        elif life.job == running:
            ended = datetime.now(UTC)
        else:  # its node died, and nobody has told since
            metrics = run / "metrics.jsonl"
            ended = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.exists() else began
        return life.gpus * max(0.0, (ended - began).total_seconds()) / 3600
    return 0.0
