"""What a run folder says of its jobs, as it is read and written.

    <run folder>/jobs/lives.json    every life: job, restart, nodes, when, the step it began and ended with, and how it ended
    <run folder>/jobs/events.log    what was decided, a line each

Loads no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_origin, get_type_hints

from genscale.cluster.checks import host_name
from genscale.cluster.slurm_commands import JOB
from genscale.errors import UserError
from genscale.masking import masked
from genscale.printable import printable
from genscale.reading import read_json
from genscale.writing import no_link, write_whole

LONGEST = 300
"""Characters of a reason."""


class _OfJob(Protocol):
    @property
    def job(self) -> str: ...


Entry = TypeVar("Entry", bound=_OfJob)


@dataclass(frozen=True)
class Life:
    """A life of a job, from `begin` to `end`.

    Attributes:
        job: as Slurm's commands take it, `12` or `12_3` of an array.
        restart: how often Slurm had requeued the job.
        gpus: of all nodes together.
        commit, snapshot: of the code that it ran (see `code_version`).
        step, end_step: of the latest checkpoint as the life began and ended.
        how: complete, stopped, failed or hang, as `ended.json` says; lost: a process, its machine or the data's server was
            gone; killed: nothing was said; unfit: a node was not fit. None while it goes on, and where the node has died that
            would say so.
        reason: of its end, in a line.
        stop: why there is no life after it; None where there is.
    """

    job: str
    restart: int
    nodes: tuple[str, ...]
    began: str
    step: int
    ended: str | None = None
    end_step: int | None = None
    how: str | None = None
    code: int | None = None
    reason: str | None = None
    goes_on: bool = False
    gpus: int = 0
    stop: str | None = None
    commit: str | None = None
    snapshot: str | None = None


def this_job() -> tuple[str, int]:
    """(job, restart) of the environment. Raises UserError outside of a job."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("genscale slurm begin and end belong into the script of a job (SLURM_JOB_ID is not set); "
                        "`genscale slurm render` writes one")
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    return name, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def read_lives(run: Path) -> list[Life]:
    """The oldest first; none where the file cannot be understood."""
    content = read_record(run / "jobs" / "lives.json") or {}
    with contextlib.suppress(TypeError, KeyError, ValueError):
        return [checked(Life(**{**known(Life, life), "nodes": tuple(life["nodes"])})) for life in content["lives"]]
    return []


def known(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Of the fields those that this version of genscale has: a job that runs its own copy of the code may have written more."""
    return {name: fields[name] for name in get_type_hints(kind) if name in fields}


def checked(entry: Entry) -> Entry:
    """An entry as it was read from a run folder. Raises TypeError or ValueError where it is none that we have written."""
    for name, kind in get_type_hints(type(entry)).items():
        value, whole = getattr(entry, name), get_origin(kind)
        texts = [*value, *(value.values() if whole is dict else ())] if whole in (tuple, dict) else []
        if not isinstance(value, whole if whole in (tuple, dict) else kind) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name}: {value!r}")
    if not JOB.fullmatch(entry.job):
        raise ValueError(f"job: {entry.job!r}")
    return entry


def write_lives(run: Path, lives: Sequence[Life]) -> None:
    write_record(run / "jobs" / "lives.json", {"lives": [asdict(life) for life in lives]})


def tell(run: Path, job: str, line: str) -> None:
    """To the job's log, and to events.log."""
    line = printable(line)
    print(f"genscale: job {job}: {line}", flush=True)
    with contextlib.suppress(OSError), open(run / "jobs" / "events.log", "a", opener=no_link) as file:
        file.write(f"{now()} job {job}: {line}\n")


def job_nodes() -> list[str]:
    """The nodes of the job, as its script has found them."""
    return os.environ.get("GENSCALE_NODES", "").split() or [host_name()]


def read_ended(run: Path) -> dict[str, Any] | None:
    """What ended.json says; None where it does not say how."""
    said = read_record(run / "ended.json") or {}
    return said if isinstance(said.get("how"), str) and isinstance(said.get("exit_code"), int) else None


def read_record(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none, or not a file of ours."""
    with contextlib.suppress(OSError, ValueError):
        content = read_json(file)
        return content if isinstance(content, dict) else None
    return None


def write_record(file: Path, content: dict[str, Any]) -> None:
    """Raises OSError."""
    write_whole(file, json.dumps(content, indent=1) + "\n")


def one_line(text: str) -> str:
    """What comes from elsewhere, as a reason that can be kept and shown."""
    line = printable(masked(" ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[:LONGEST - 4]} ..."


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
