"""Which jobs a run has: those that were submitted for it, and those that have begun in its folder.

    <run folder>/jobs/0001/         a submission: job.sbatch and the resolved config.yaml
    <run folder>/jobs/code-.../     the code that it runs (see `snapshot`)
    <run folder>/jobs/jobs.json     which job each became, where it prints to, and the runs that it trains

An array has a folder of its own with the submission, <run.dir>/<run.name>, and its runs lie beside that.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from genscale.cluster import slurm_commands
from genscale.cluster.lives import checked, known, read_lives, read_record
from genscale.cluster.slurm_commands import Queued
from genscale.reading import read_yaml
from genscale.writing import make_folder, write_whole


@dataclass(frozen=True)
class Submitted:
    """A job as it was submitted.

    Attributes:
        job: as Slurm's commands take it, `12`, or `12_3` of an array.
        kept: folder with script and config.
        log: what it prints; None of an array as a whole.
        runs: folders of the runs that it trains.
        settings: of an element of an array, those that it differs from the others in.
    """

    job: str
    kept: str
    log: str | None
    runs: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)
    time: str = ""


def new_folder(run: Path) -> Path:
    """An empty folder for what is submitted next: <run>/jobs/0001, and so on. Raises OSError."""
    make_folder(run / "jobs", parents=True)
    number = max((int(path.name) for path in (run / "jobs").glob("[0-9]*") if path.name.isdigit()), default=0)
    while True:
        number += 1
        folder = run / "jobs" / f"{number:04d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def record(folder: Path, entry: Submitted) -> None:
    """Note in that folder that the job was submitted. Raises OSError."""
    file = folder / "jobs" / "jobs.json"
    make_folder(file.parent, parents=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    jobs = [asdict(each) for each in [*submitted(folder), entry]]
    write_whole(file, json.dumps({"jobs": [*jobs[:-1], {**jobs[-1], "time": now}]}, indent=1) + "\n")


def submitted(folder: Path) -> list[Submitted]:
    """What was recorded in that folder, the oldest first, with its paths as they are reached through the folder."""
    content = read_record(folder / "jobs" / "jobs.json") or {}
    with contextlib.suppress(ValueError, TypeError, KeyError, OSError):
        entries = [checked(Submitted(**{**known(Submitted, entry), "runs": tuple(entry["runs"])})) for entry in content["jobs"]]
        return [_reached(folder, entry) for entry in entries]
    return []


def _reached(folder: Path, entry: Submitted) -> Submitted:
    """All its paths lie in run.dir, which may have been a relative one, or has another name by now."""
    kept, now = Path(entry.kept), Path(os.path.normpath(folder / ".."))
    before = Path(*kept.parts[:-3])

    def moved(path: str) -> str:
        return str(now / Path(path).relative_to(before)) if Path(path).is_relative_to(before) else path

    if not Path(moved(entry.kept)).is_dir():  # the folder is a link from elsewhere
        return entry
    return replace(entry, kept=moved(entry.kept), log=entry.log and moved(entry.log), runs=tuple(map(moved, entry.runs)))


def jobs_of(folder: Path) -> list[str]:
    """Every job that was submitted for the run, or the array, of that folder, or that has begun there, the oldest first."""
    found = [entry.job for entry in submitted(folder)] + [life.job for life in read_lives(folder)]
    return list(dict.fromkeys(found))


def training_steps(run: Path) -> int | None:
    """In all, as the latest submission says, or else as the run itself; None where neither can be read."""
    files = [*(Path(entry.kept) / "config.yaml" for entry in reversed(submitted(run))), run / "config.yaml"]
    return next(filter(None, map(steps_in, files)), None)


def steps_in(config: Path) -> int | None:
    """`train.steps` of a config.yaml; None where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        steps = read_yaml(config)["train"]["steps"]
        return steps if type(steps) is int and 0 < steps < 2**63 else None
    return None


def active_jobs(folders: Sequence[Path], queue: Sequence[Queued] | None = None) -> list[Queued]:
    """The jobs of those folders that wait, run, or are on their way back into the queue. Raises UserError.

    Args:
        queue: where it has been asked for already.
    """
    returning = {life.job for folder in folders for life in read_lives(folder)[-1:] if life.goes_on}
    return slurm_commands.active([job for folder in folders for job in jobs_of(folder)], queue, returning)


def with_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders, and those of the runs of arrays among them, which may have been given jobs of their own later."""
    return list(dict.fromkeys([*folders, *runs_of(folders)]))


def runs_of(folders: Sequence[Path]) -> list[Path]:
    """The runs of those folders: themselves, or those of their arrays."""
    found = []
    for folder in folders:
        entries = submitted(folder)
        found += [Path(run) for entry in entries for run in entry.runs] or [folder]
    return list(dict.fromkeys(found))
