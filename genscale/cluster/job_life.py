"""A life of a job: what happens before and after the training in its script, and whether there is another one.

    <run folder>/jobs/lives.json    every life: job, restart, nodes, when, the step it began and ended with, and how it ended
    <run folder>/jobs/events.log    what was decided, a line each
    <run folder>/jobs/exclude       nodes that the job is not to be given again
    <run folder>/jobs/nodes/        what each node of the latest life said of itself

Loads no torch: it stands before and after every life.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from genscale import exit_codes
from genscale.cluster.checks import Check, host_name
from genscale.cluster.clocks import server_offset
from genscale.cluster.doctor import quick_check
from genscale.cluster.job_nodes import compare_nodes
from genscale.cluster.slurm_commands import JOB
from genscale.errors import UserError
from genscale.printable import printable
from genscale.reading import read_json, read_text
from genscale.training.checkpoint_names import latest_step
from genscale.training.code_version import commit, in_words, snapshot
from genscale.training.run_owner import RunOwner
from genscale.writing import make_folder, no_link, write_whole

NOTHING_TO_DO = 10
"""Exit code of `begin`: an earlier life of the job has completed the run."""
UNFIT = 11
"""Exit code of `begin`: a node is not fit to train on."""
AGAIN = 75
"""Exit code of `end`: the job is to be requeued."""
LARGEST = 16 * 2**20
"""Bytes of a file that such records are read from."""
FRUITLESS_LIVES = 3
"""So many in a row without a new checkpoint end a job."""
RETRY_SECONDS = (5.0, 20.0)
"""Between tries to write the end of a life down."""
NODES_SECONDS = 180.0
"""For the job's nodes to report, after the first of them has: a file server that a thousand nodes read Python from is slow."""


Entry = TypeVar("Entry")


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


def begin(run: Path, max_requeues: int, workers: int) -> int:
    """The beginning of a life, on each of the job's nodes: looks at the node, and on the first of them counts the life.

    Args:
        workers: `data.workers` of the run.

    Returns: 0 to go on, NOTHING_TO_DO or UNFIT. Raises UserError where the run folder is another run's, or the job may not
    begin once more.
    """
    job, restart = this_job()
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    for part in ("jobs", "jobs/nodes", "logs"):
        make_folder(run / part, parents=True)
    lives = read_lives(run)
    if first and lives and lives[-1].job == job and (read_ended(run) or {}).get("how") == "complete":
        tell(run, job, f"nothing to do: the run is complete at step {latest_step(run)}")
        return NOTHING_TO_DO
    checks = quick_check(run, workers)
    failures = [f"{check.name}: {check.found}" for check in checks if check.state == "failure"]
    for check in checks:
        if check.state == "warning":
            print(f"genscale: {host_name()}: warning: {check.name}: {check.found}; {check.remedy}", flush=True)
    at_fault = any(check.state == "failure" and check.of_node for check in checks)
    report = {"job": job, "restart": restart, "failures": failures, "at_fault": at_fault, "clock": server_offset(run),
              "versions": [check.as_dict() for check in checks if check.name == "versions"]}
    _write(run / "jobs" / "nodes" / f"{host_name()}.json", report)
    if not first:
        return 0  # the first one reads what was said
    count_life(run, job, restart, max_requeues)
    return _judge_nodes(run, job, restart)


def count_life(run: Path, job: str, restart: int, max_requeues: int) -> None:
    """Claim the run folder for a moment, which ends whoever of an earlier life still writes there, and note the life.

    Raises UserError where another run has the folder, or where the job is at its end.
    """
    lives = [_closed(run, life) if life.how is None else life for life in read_lives(run)]
    mine = [life for life in lives if life.job == job]
    if reason := why_no_more(mine, max_requeues):
        raise UserError(f"{run}: {reason}")
    RunOwner(run, lambda line: tell(run, job, line)).release()
    (run / "ended.json").unlink(missing_ok=True)
    (run / "jobs" / "exclude").unlink(missing_ok=True)
    here = os.environ.get("SLURM_GPUS_ON_NODE", "")
    life = Life(job, restart, tuple(_nodes()), _now(), latest_step(run),
                gpus=int(here) * len(_nodes()) if here.isdigit() else 0, commit=commit(), snapshot=snapshot())
    _write_lives(run, [*lives, life])
    tell(run, job, f"life {len(mine) + 1} begins on {', '.join(life.nodes)} after step {life.step}"
                   f"{f': {code}' if (code := in_words(life.commit, life.snapshot)) else ''}")


def _closed(run: Path, life: Life) -> Life:
    """A life whose end nobody has told: its node has died, or Slurm has requeued the job over its head."""
    said = read_ended(run) or {}
    return replace(life, ended=_now(), end_step=latest_step(run), how=said.get("how", "killed"), code=said.get("exit_code"),
                   reason=said.get("reason"), goes_on=True)


def _judge_nodes(run: Path, job: str, restart: int) -> int:
    """UNFIT where a node is not fit, or does not answer. A fault that all of them have is no node's own."""
    nodes = _nodes()
    reports = _reports(run, nodes, job, restart)
    versions = {node: [Check.from_dict(fields) for fields in report["versions"]] for node, report in reports.items()}
    for check in compare_nodes(versions, {node: report["clock"] for node, report in reports.items()}):
        if check.state == "failure":
            reports[check.host]["failures"].append(f"{check.name}: {check.found}")
            reports[check.host]["at_fault"] = True
        elif check.state == "warning":
            tell(run, job, f"warning: {check.name}: {check.found}; {check.remedy}")
    faults = {node: "; ".join(reports[node]["failures"]) for node in nodes if node in reports and reports[node]["failures"]}
    silent = [node for node in nodes if node not in reports]
    for node, fault in faults.items():
        tell(run, job, f"{node} is not fit: {fault}")
    for node in silent:
        tell(run, job, f"{node} has not reported within {NODES_SECONDS:.0f} s: it could not start Python, or does not share "
                       f"{run}")
    if not faults and not silent:
        return 0
    if 1 < len(silent) == len(nodes) - 1:
        tell(run, job, f"{run} is not on a file system that the nodes share; set run.dir to one")
        return UNFIT
    excluded = sorted({*silent, *(node for node in faults if reports[node]["at_fault"])})
    if excluded and (len(excluded) < len(nodes) or len(nodes) == 1):
        write_whole(run / "jobs" / "exclude", ",".join(excluded))
    return UNFIT


def _reports(run: Path, nodes: Sequence[str], job: str, restart: int) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + NODES_SECONDS
    while True:
        found = {}
        for node in nodes:
            report = read_record(run / "jobs" / "nodes" / f"{node}.json")
            if report and (report.get("job"), report.get("restart")) == (job, restart):
                found[node] = report
        if len(found) == len(nodes) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def end(run: Path, code: int, max_requeues: int) -> int:
    """The end of a life: says how it ended and whether there is another one.

    Args:
        code: the exit code of what has run, as srun gave it.

    Returns: AGAIN, or the exit code of the job.
    """
    job, restart = this_job()
    lives = read_lives(run)
    if any(life.job == job and life.restart > restart for life in lives):
        # This life's node was cut off, and Slurm has started the job elsewhere meanwhile.
        tell(run, job, f"the life after restart {restart} ends, for a later one has the run")
        return code or exit_codes.OUR_ERROR
    if lives and (lives[-1].job, lives[-1].restart) == (job, restart):
        life = _with_end(run, lives.pop(), read_ended(run), code)
    elif code == exit_codes.USER_ERROR:
        tell(run, job, "not requeued: it was refused at its beginning")
        return code
    else:  # stopped before it was counted
        step = latest_step(run)
        life = Life(job, restart, tuple(_nodes()), _now(), step, _now(), step, "killed", code,
                    commit=commit(), snapshot=snapshot())
    mine = [each for each in lives if each.job == job] + [life]
    stop = why_not_again(life, mine, max_requeues)
    life = replace(life, goes_on=stop is None)
    _keep_lives(run, job, [*lives, life])
    how = f"{life.how}{f' ({life.reason})' if life.reason and life.how != 'complete' else ''}"
    tell(run, job, f"life {len(mine)} ended after step {life.end_step}: {how}; {stop or 'the job is requeued'}")
    if stop is None:
        return AGAIN
    return exit_codes.DONE if life.how == "complete" else life.code or exit_codes.OUR_ERROR


def _keep_lives(run: Path, job: str, lives: Sequence[Life]) -> None:
    """A disk that is full, or away for a moment, must not be the end of a job whose last checkpoint is whole: without a word
    about its end, the next life takes this one for killed. Raises OSError where the run folder is gone."""
    for seconds in (*RETRY_SECONDS, None):
        try:
            _write_lives(run, lives)
            return
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            then = "goes on without" if seconds is None else f"tries again in {seconds:g} s"
            tell(run, job, f"the end of this life cannot be written to {run} ({error.strerror}); {then}")
        time.sleep(seconds or 0)


def _with_end(run: Path, life: Life, said: dict[str, Any] | None, code: int) -> Life:
    how, reason = (said["how"], said.get("reason")) if said else ("killed", None)
    if said is None and code == exit_codes.DONE:
        how = "complete"  # on a full disk, say, it could not write so
    elif said is None and code == UNFIT:
        how = "unfit"
        with contextlib.suppress(OSError, ValueError):  # there need not be any
            reason = read_text(run / "jobs" / "exclude", LARGEST)
    elif said is None and code == exit_codes.USER_ERROR:
        how = "failed"
    elif said and said.get("signal"):
        reason = said["signal"]
    return replace(life, ended=_now(), end_step=latest_step(run), how=how, reason=reason,
                   code=said["exit_code"] if said else code)


def why_not_again(life: Life, lives: Sequence[Life], max_requeues: int) -> str | None:
    """Why there is no life after this one, the last of `lives` of its job; None where there is."""
    if life.how == "complete":
        return "the run is complete"
    if life.how == "failed" and life.code == exit_codes.USER_ERROR:
        return "not requeued: it would fail again"
    if life.how == "unfit" and life.reason is None:
        return "not requeued: other nodes would do no better"
    return why_no_more(lives, max_requeues)


def why_no_more(lives: Sequence[Life], max_requeues: int) -> str | None:
    """Why a job with these lives behind it has no further one; None where it has."""
    if len(lives) > max_requeues:
        return f"not requeued: the job has had {len(lives)} lives (--max-requeues {max_requeues})"
    last = lives[-FRUITLESS_LIVES:]
    if len(last) == FRUITLESS_LIVES and all((life.end_step or 0) <= life.step for life in last):
        return (f"not requeued: {FRUITLESS_LIVES} lives in a row have brought no new checkpoint (the latest is of step "
                f"{last[-1].end_step})")
    return None


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


def _write_lives(run: Path, lives: Sequence[Life]) -> None:
    _write(run / "jobs" / "lives.json", {"lives": [asdict(life) for life in lives]})


def tell(run: Path, job: str, line: str) -> None:
    """To the job's log, and to events.log."""
    line = printable(line)
    print(f"genscale: job {job}: {line}", flush=True)
    with contextlib.suppress(OSError), open(run / "jobs" / "events.log", "a", opener=no_link) as file:
        file.write(f"{_now()} job {job}: {line}\n")


def _nodes() -> list[str]:
    """Of the job, as its script has found them."""
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


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
