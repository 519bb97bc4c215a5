"""genscale slurm logs: what a run prints, as it does so."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genscale.cluster import slurm_commands
from genscale.cluster.job_records import active_jobs, jobs_of, runs_of, submitted, with_runs
from genscale.errors import UserError
from genscale.settings.parser import parse_settings

MOST = 16 * 2**20
"""Bytes of a file that are read at a time, and of its end at first."""
POLL_SECONDS = 1.0
QUEUE_SECONDS = 10.0
"""Between two looks at the queue and for new files, of which the controller would not like more."""


@dataclass
class LogSettings:
    """What to show of a run's logs."""

    all: bool = False
    """The log file of every rank, too."""
    lines: int = 20
    """Lines of each file to begin with."""


def follow(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """genscale slurm logs RUN: what its job prints (rank 0 speaks for all), until the job has ended. Raises UserError."""
    settings = parse_settings(LogSettings, arguments, "genscale slurm logs RUN", "Follow what a run prints.")
    if len(folders) != 1 or not folders[0].is_dir():
        raise UserError("genscale slurm logs: name one run folder" + (f", not {folders[0]}" if folders else ""))
    places: dict[Path, int] = {}
    looked, goes_on = float("-inf"), True
    while goes_on:
        if time.monotonic() - looked > QUEUE_SECONDS:
            looked, goes_on = time.monotonic(), bool(active_jobs(with_runs(folders)))
            found = files(folders[0], settings.all)  # for which Slurm may have to be asked as well
        for file in found:
            _show_news(file, places, settings.lines, named=settings.all or len(runs_of(folders)) > 1, ended=not goes_on)
        if goes_on:
            time.sleep(POLL_SECONDS)
    if not places:
        raise UserError(f"genscale slurm logs: {folders[0]} has no logs yet, and no job in the queue")
    return 0


def files(folder: Path, ranks: bool) -> list[Path]:
    """What the latest job of each of its runs prints; and, for `ranks`, the log of each rank."""
    found: list[Path] = []
    for run in runs_of([folder]):
        logs = [entry.log for entry in submitted(run) if entry.log]
        log = logs[-1] if logs else next(filter(None, map(slurm_commands.printed_to, reversed(jobs_of(run)))), None)
        found += [Path(log)] if log and Path(log).is_file() else []
        found += sorted(path for path in (run / "logs").glob("rank-*.log") if path.is_file()) if ranks else []
    return found


def _show_news(file: Path, places: dict[Path, int], lines: int, named: bool, ended: bool) -> None:
    """Print the lines that have come to the file since it was last looked at; at first, its last ones.

    Args:
        ended: nothing more comes: a last line without an end is one.
    """
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            start = opened.seek(places.get(file, max(0, size - MOST)))
            news = opened.read(MOST)
    except OSError:
        return
    if not ended:
        news = news[:news.rfind(b"\n") + 1]
    new, places[file] = file not in places, start + len(news)
    shown = news.decode(errors="replace").splitlines()
    for line in shown[max(0, len(shown) - lines):] if new else shown:
        print(f"{file.name}: {line}" if named else line, flush=True)
