"""Slurm's own commands: what they are asked, and what they answer."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from genscale.cluster.environment import clean_environment
from genscale.errors import UserError

JOB = re.compile(r"[0-9]{1,20}(_[0-9]{1,10})?")
"""A job, or an element of an array. Nothing else from a run folder is handed to Slurm's commands."""
SECONDS = 60
"""Longest wait for an answer: the controller may be busy, or away."""


@dataclass(frozen=True)
class Queued:
    """A job, or an element of an array (`12_3`), that is in the queue or runs.

    Attributes:
        reason: why it waits, where it does.
        time_left: of this life, as Slurm writes it.
    """

    job: str
    state: str
    reason: str
    nodes: str
    time_left: str


def need(command: str) -> None:
    """Raises UserError where Slurm is not installed here."""
    if shutil.which(command) is None:
        raise UserError(f"{command}: not found on this machine; run this on a login node of the cluster (`genscale slurm "
                        "render --config FILE --out job.sbatch` writes the script here)")


def ask(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands, in an environment that says nothing of another job. Raises UserError where there is none, or
    no answer."""
    need(command)
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=SECONDS, env=clean_environment())
    except subprocess.TimeoutExpired:
        raise UserError(f"{command}: no answer from Slurm within {SECONDS} s; try again later") from None


def queue() -> list[Queued]:
    """The user's jobs that wait or run, elements of arrays one by one. Raises UserError."""
    done = ask("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i|%T|%r|%N|%L")
    if done.returncode:
        raise UserError(f"squeue: {_words(done.stderr)}")
    return [Queued(*line.split("|")) for line in done.stdout.splitlines() if line.count("|") == 4]


def active(jobs: Iterable[str], among: Sequence[Queued] | None = None, returning: Collection[str] = ()) -> list[Queued]:
    """Those of the queue that belong to one of the jobs, themselves or elements of their arrays, and are not at their end.

    Args:
        among: the queue, where it has been asked for already.
        returning: jobs that are requeued, which Slurm shows as completing until their nodes are free.
    """
    wanted = set(jobs)
    return [each for each in (queue() if among is None else among)
            if (each.job in wanted or each.job.partition("_")[0] in wanted)
            and (each.state != "COMPLETING" or each.job in returning)]


def last_state(job: str) -> tuple[str, str] | None:
    """How Slurm says that a job ended, as CANCELLED, and why, as JobLaunchFailure, or nothing; None where it has forgotten the
    job."""
    accounting = ["--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job]
    live = r"JobState=(\w+)(?: Reason=(?!None|NonZeroExitCode)(\w+))?"
    for command, arguments, pattern in (("scontrol", ["--oneliner", "show", "job", job], live),
                                        ("sacct", accounting, r"^(\w+)()")):
        if shutil.which(command):
            done = ask(command, *arguments)
            if not done.returncode and (match := re.search(pattern, done.stdout, re.MULTILINE)):
                return match[1], match[2] or ""
    return None


def states_of_lives(job: str) -> list[str]:
    """How each life of a job ended, as NODE_FAIL, the first one first; empty where there is no accounting. Raises UserError."""
    done = ask("sacct", "--noheader", "--allocations", "--duplicates", "--parsable2", "--format=State", "--jobs", job)
    return re.findall(r"^[A-Z_]+", done.stdout, re.MULTILINE) if not done.returncode else []


def printed_to(job: str) -> str | None:
    """The file that a job prints to, while Slurm remembers it."""
    done = ask("scontrol", "show", "job", job)
    match = re.search(r"^\s*StdOut=(.+)$", done.stdout, re.MULTILINE) if not done.returncode else None
    return match[1] if match else None


def cancel(jobs: Iterable[str]) -> None:
    """Raises UserError."""
    done = ask("scancel", *jobs)
    if done.returncode:
        raise UserError(f"scancel: {_words(done.stderr)}")


def control(action: str, jobs: Iterable[str]) -> None:
    """`scontrol hold` or `release`. Raises UserError."""
    done = ask("scontrol", action, ",".join(jobs))
    if done.returncode:
        raise UserError(f"scontrol {action}: {_words(done.stderr)}")


def submit(script: str, test_only: bool = False, options: Sequence[str] = ()) -> str:
    """Hand the script (a file) to sbatch. Returns the job's number, or what sbatch says of a job that it only tests.

    The options at its top stand on the command line too, where nothing beats them; and after them `options`, which do.

    Raises UserError with Slurm's words and the name of the setting that they are about.
    """
    asked = ["--export=ALL", *options_in(Path(script).read_text()), *options]
    done = ask("sbatch", "--test-only" if test_only else "--parsable", *asked, script)
    if done.returncode:
        raise UserError(explain(_words(done.stderr)))
    if test_only:
        return _words(done.stderr)
    return done.stdout.strip().partition(";")[0]


def options_in(script: str) -> list[str]:
    """The options of sbatch at the top of a script."""
    lines = [line.removeprefix("#SBATCH") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line, comments=True)]


# Slurm's words, and the settings of ours they are about.
ABOUT = (
    (r"invalid partition", "--partition"),
    (r"invalid account|account/partition", "--account"),
    (r"time limit|time specification", "--time"),
    (r"invalid qos", "--qos"),
    (r"reservation", "--reservation"),
    (r"constraint|feature", "--constraint"),
    (r"dependency", "--dependency, --after"),
    (r"memory", "--mem"),
    (r"node configuration|more processors|node count|gres|too many|cpu count", "--nodes, --gpus-per-node, --cpus-per-process"),
    (r"array", "--array"),
    (r"unrecognized option|invalid option", "--sbatch, site.sbatch"),
)


def explain(words: str) -> str:
    """Slurm's message as one of ours: the setting first."""
    setting = next((setting for pattern, setting in ABOUT if re.search(pattern, words, re.IGNORECASE)), "sbatch")
    return f"{setting}: refused by Slurm: {words}{_partitions() if setting == '--partition' else ''}"


def _partitions() -> str:
    """Those that this cluster has, where it can be told."""
    done = ask("sinfo", "--noheader", "--format=%R")
    names = sorted({line.strip() for line in done.stdout.splitlines()})
    return f" (it has {', '.join(names)})" if names and not done.returncode else ""


def _words(text: str) -> str:
    """What a command said, without its own name before each line."""
    return " ".join(re.sub(r"^\w+: (error: )?", "", line) for line in text.splitlines() if line.strip())
