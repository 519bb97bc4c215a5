"""A life of a job: what happens before and after the training in its script, and whether there is another one.

    <run folder>/jobs/lives.json    every life: job, restart, nodes, when, the step it began and ended with, and how it ended
    <run folder>/jobs/events.log    what was decided, a line each
    <run folder>/jobs/exclude       nodes that the job is not to be given again
    <run folder>/jobs/nodes/        what each node of the latest life said of itself

Loads no torch: it stands before and after every life.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from genscale import exit_codes
from genscale.checkpoint.code_version import commit, in_words, snapshot
from genscale.checkpoint.names import latest_step
from genscale.cluster import fitness
from genscale.cluster.checks import host_name
from genscale.cluster.clocks import server_offset
from genscale.cluster.doctor import quick_check
from genscale.cluster.job_records import steps_in
from genscale.cluster.lives import Life, job_nodes, now, read_ended, read_lives, tell, this_job, write_lives
from genscale.cluster.ports import free_port
from genscale.cluster.why_ended import of_the_disk, why_cut_off, why_ended
from genscale.errors import UserError
from genscale.supervise.run_owner import RunOwner
from genscale.writing import make_folder, write_whole

T = TypeVar("T")

NOTHING_TO_DO = 10
"""Exit code of `begin`: an earlier life of the job has completed the run."""
UNFIT = 11
"""Exit code of `begin`: a node is not fit to train on."""
NO_ROOM = 12
"""Exit code of `begin`: the run folder cannot be written, for want of space perhaps."""
AGAIN = 75
"""Exit code of `end`: the job is to be requeued."""
FRUITLESS_LIVES = 3
"""So many in a row without a new checkpoint end a job."""
RETRY_SECONDS = (5.0, 20.0)
"""Between tries to write the end of a life down."""
ROOM_SECONDS = (5.0, 20.0, 60.0)
"""Between tries to begin a life on a disk that is full, or away."""
NODES_SECONDS = 180.0
"""For the job's nodes to report, after the first of them has: a file server that a thousand nodes read Python from is slow."""


def begin(run: Path, max_requeues: int, workers: int) -> int:
    """The beginning of a life, on each of the job's nodes: looks at the node, and on the first of them counts the life.

    Args:
        workers: `data.workers` of the run.

    Returns: 0 to go on, NOTHING_TO_DO, UNFIT or NO_ROOM. Raises UserError where the run folder is another run's, or cannot be
    one, or the job may not begin once more.
    """
    job, restart = this_job()
    found = _with_patience(run, job, ROOM_SECONDS, f"{host_name()}: the beginning of a life", "this life ends",
                           lambda last_try: _begin(run, job, restart, max_requeues, workers, last_try))
    return NO_ROOM if found is None else found


def _begin(run: Path, job: str, restart: int, max_requeues: int, workers: int, last_try: bool) -> int:
    """Raises OSError where the run folder cannot be written, or on a disk that is too full to begin on."""
    first = os.environ.get("SLURM_PROCID", "0") == "0"
    for part in ("jobs", "jobs/nodes", "logs"):
        make_folder(run / part, parents=True)
    lives = read_lives(run)
    if first and lives and lives[-1].job == job and (read_ended(run) or {}).get("how") == "complete":
        tell(run, job, f"nothing to do: the run is complete at step {latest_step(run)}")
        return NOTHING_TO_DO
    checks = quick_check(run, workers)
    full = [check for check in checks if check.state == "failure" and check.name in fitness.OF_THE_DISK]
    if full and not last_try:
        raise OSError(f"{full[0].name}: {full[0].found}")
    for check in checks:
        if check.state == "warning":
            print(f"genscale: {host_name()}: warning: {check.name}: {check.found}; {check.remedy}", flush=True)
    fitness.report(run, job, restart, checks, server_offset(run))
    if not first:
        return 0  # the first one reads what was said
    count_life(run, job, restart, max_requeues)
    return _judge_nodes(run, job, restart)


def count_life(run: Path, job: str, restart: int, max_requeues: int) -> None:
    """Claim the run folder for a moment, which ends whoever of an earlier life still writes there, and note the life.

    Raises UserError where another run has the folder, or where the job is at its end.
    """
    lives = [_closed(run, life) if life.how is None else life for life in read_lives(run)
             if (life.job, life.restart) != (job, restart)]  # a try before this one may have come so far
    mine = [life for life in lives if life.job == job]
    if reason := why_no_more(mine, max_requeues):
        raise UserError(f"{run}: {reason}")
    RunOwner(run, lambda line: tell(run, job, line)).release()
    (run / "ended.json").unlink(missing_ok=True)
    (run / "jobs" / "exclude").unlink(missing_ok=True)
    here = os.environ.get("SLURM_GPUS_ON_NODE", "")
    life = Life(job, restart, tuple(job_nodes()), now(), latest_step(run),
                gpus=int(here) * len(job_nodes()) if here.isdigit() else 0, commit=commit(), snapshot=snapshot())
    write_lives(run, [*lives, life])
    tell(run, job, f"life {len(mine) + 1} begins on {', '.join(life.nodes)} after step {life.step}"
                   f"{f': {code}' if (code := in_words(life.commit, life.snapshot)) else ''}")


def _closed(run: Path, life: Life) -> Life:
    """A life whose end nobody has told: its node has died, or Slurm has requeued the job over its head."""
    said = read_ended(run) or {}
    reason = said.get("signal") or said.get("reason") if said else why_cut_off(run, life.job, life.restart)
    return replace(life, ended=now(), end_step=latest_step(run), how=said.get("how", "killed"), code=said.get("exit_code"),
                   reason=reason, goes_on=True)


def _judge_nodes(run: Path, job: str, restart: int) -> int:
    """UNFIT where a node is not fit, or does not answer; NO_ROOM where only the disk is full. Else where the processes are to
    meet is written down."""
    nodes = job_nodes()
    verdict = fitness.judge(run, nodes, job, restart, NODES_SECONDS)
    for warning in verdict.warnings:
        tell(run, job, f"warning: {warning}")
    for node, fault in verdict.faults.items():
        tell(run, job, f"{node} is not fit: {fault}")
    for node in verdict.silent:
        tell(run, job, f"{node} has not reported within {NODES_SECONDS:.0f} s: it could not start Python, or does not share "
                       f"{run}")
    if verdict.reason is None:
        write_whole(run / "jobs" / "port", f"{free_port(int(os.environ['SLURM_JOB_ID']), restart)}\n")
        return 0
    if 1 < len(verdict.silent) == len(nodes) - 1:
        tell(run, job, f"{run} is not on a file system that the nodes share; set run.dir to one")
    return NO_ROOM if verdict.disk_only else UNFIT


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
        life = Life(job, restart, tuple(job_nodes()), now(), latest_step(run), commit=commit(), snapshot=snapshot())
        life = _with_end(run, life, None, code)
    excluded: tuple[str, ...] = ()
    if life.how == "unfit" and code != NO_ROOM:
        verdict = fitness.judge(run, life.nodes, job, restart, seconds=0)
        excluded, life = verdict.excluded, replace(life, reason=verdict.reason or life.reason)
        _with_patience(run, job, RETRY_SECONDS, "the nodes to be left out", "goes on without",
                       lambda _: fitness.exclude(run, excluded))
    mine = [each for each in lives if each.job == job] + [life]
    stop = why_not_again(life, mine, max_requeues, excluded)
    life = replace(life, goes_on=stop is None, stop=stop)
    _with_patience(run, job, RETRY_SECONDS, "the end of this life", "goes on without",
                   lambda _: write_lives(run, [*lives, life]))
    how = f"{life.how}{f' ({life.reason})' if life.reason and life.how != 'complete' else ''}"
    left_out = f"; {', '.join(excluded)} is left out of the next life" if excluded and stop is None else ""
    tell(run, job, f"life {len(mine)} ended after step {life.end_step}: {how}; {stop or 'the job is requeued'}{left_out}")
    if stop is None:
        return AGAIN
    return exit_codes.DONE if life.how == "complete" else life.code or exit_codes.OUR_ERROR


def _with_patience(run: Path, job: str, pauses: Sequence[float], what: str, at_last: str,
                   write: Callable[[bool], T]) -> T | None:
    """A disk that is full, or away for a moment, must not be the end of a job whose last checkpoint is whole: without a word
    about its end, the next life takes this one for killed.

    Args:
        pauses: seconds between two tries.
        at_last: what becomes of it where the last one fails too.
        write: is told whether it is the last try.

    Returns: what `write` returned; None where no try came through. Raises OSError where the run folder is gone.
    """
    for seconds in (*pauses, None):
        try:
            return write(seconds is None)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            then = at_last if seconds is None else f"tries again in {seconds:g} s"
            tell(run, job, f"{what} cannot be written to {run} ({error.strerror or error}); {then}")
        time.sleep(seconds or 0)
    return None


def _with_end(run: Path, life: Life, said: dict[str, Any] | None, code: int) -> Life:
    if said:
        how, reason = said["how"], said.get("signal") or said.get("reason")
    elif code == exit_codes.DONE:  # on a full disk, say, it could not write how it ended
        whole = latest_step(run) >= (steps_in(run / "config.yaml") or 0)
        how, reason = ("complete", None) if whole else ("stopped", "before its last step; why could not be written")
    elif code in (UNFIT, NO_ROOM):
        how, reason = "unfit", f"{run} cannot be written, for want of space perhaps" if code == NO_ROOM else None
    else:
        reason = why_ended(run, life.job, code, life.began)
        how = "failed" if code == exit_codes.USER_ERROR and not of_the_disk(reason) else "killed"
    return replace(life, ended=now(), end_step=latest_step(run), how=how, reason=reason,
                   code=said["exit_code"] if said else code)


def why_not_again(life: Life, lives: Sequence[Life], max_requeues: int, excluded: Sequence[str] = ()) -> str | None:
    """Why there is no life after this one, the last of `lives` of its job; None where there is.

    Args:
        excluded: nodes that the next one would be without.
    """
    if life.how == "complete":
        return "the run is complete"
    if life.how == "failed" and life.code == exit_codes.USER_ERROR:
        return "not requeued: it would fail again"
    if life.code == NO_ROOM and not life.end_step:
        return "not requeued: there is no checkpoint yet that could be lost"
    if life.how == "unfit" and life.code != NO_ROOM and not excluded:
        return "not requeued: other nodes would do no better"
    return why_no_more(lives, max_requeues)


def why_no_more(lives: Sequence[Life], max_requeues: int) -> str | None:
    """Why a job with these lives behind it has no further one; None where it has."""
    had = max(len(lives), lives[-1].restart + 1) if lives else 0  # on a full disk some could not be counted
    if had > max_requeues:
        return f"not requeued: the job has had {had} lives (--max-requeues {max_requeues})"
    last = [life for life in lives if life.code != NO_ROOM][-FRUITLESS_LIVES:]
    if len(last) == FRUITLESS_LIVES and all((life.end_step or 0) <= life.step for life in last):
        return (f"not requeued: {FRUITLESS_LIVES} lives in a row have brought no new checkpoint (the latest is of step "
                f"{last[-1].end_step})")
    return None
