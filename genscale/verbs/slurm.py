"""genscale slurm: submit jobs and look after them; and begin and end, for the scripts of jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genscale import exit_codes
from genscale.errors import UserError, nearest

ACTIONS = {
    "render": "print the script of a job (or write it with --out FILE); its lives run the code as they find it",
    "submit": "check the run and the site, keep script, config and a copy of the code in the run folder, and submit the job",
    "status": "the jobs of runs (of all in runs/ and <scratch>/runs): queued, running, requeued, ended; step, loss, speed, "
              "GPU hours, predicted end; --sweep: the runs of arrays and their final metrics, side by side",
    "logs": "follow what rank 0 prints (--all: every rank)",
    "resubmit": "submit the latest job of runs again, with the script and the config that were kept, and the code as it is now "
                "(after a fix)",
    "hold": "keep the jobs of runs from starting, until they are released",
    "release": "let them start",
    "cancel": "take the jobs of runs out of the queue, or end them",
    "begin": "in the script of a job, before the training: look at the node, count this life of the job",
    "lost": "in it, where a process has ended: say so to the others, if it has not done so itself",
    "end": "in the script of a job, after it: say how it ended, and whether it is to be requeued",
}


def main(arguments: list[str]) -> int:
    action, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if action in ("-h", "--help"):
        print(_usage())
        return exit_codes.DONE if arguments else exit_codes.USER_ERROR
    if action in ("begin", "lost", "end"):
        return _life(action, rest)
    if action in ("render", "submit"):
        return _submit(action, rest)
    if action in ("status", "logs", "resubmit", "hold", "release", "cancel"):
        return _look(action, rest)
    raise UserError(f"genscale slurm: '{action}' is none of {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")


def _usage() -> str:
    lines = ["usage: genscale slurm ACTION ...", "", "Trains on a cluster of Slurm. The actions:", ""]
    lines += [f"  {action:<10}{meaning}" for action, meaning in ACTIONS.items()]
    return "\n".join([*lines, "", "`genscale slurm ACTION --help` lists the settings of an action. What is particular to a "
                      "cluster stands in launch/site.yaml, or in ~/.config/genscale/site.yaml."])


@dataclass
class LifeSettings:
    """The part of a job's script that is genscale's."""

    code: int = 0
    """lost, end: the exit code of what has run."""
    max_requeues: int = 100
    """Lives of the job after the first."""
    workers: int = 0
    """begin: `data.workers` of the run, which the node must have the cores, files and memory for."""


def _life(action: str, arguments: list[str]) -> int:
    from genscale.cluster.job_life import begin, end
    from genscale.cluster.lost_process import tell_the_others
    from genscale.settings.parser import parse_settings

    run, arguments = _runs(arguments)
    settings = parse_settings(LifeSettings, arguments, f"genscale slurm {action} RUN", ACTIONS[action])
    if len(run) != 1:
        raise UserError(f"genscale slurm {action}: name one run folder")
    try:
        if action == "begin":
            return begin(run[0], settings.max_requeues, settings.workers)
        if action == "lost":
            return tell_the_others(run[0], settings.code)
        return end(run[0], settings.code, settings.max_requeues)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {run[0]} ({error.strerror}); free some space, or set --run.dir to another "
                        "folder") from None


def _submit(action: str, arguments: list[str]) -> int:
    from genscale.cluster.submission import print_script, submit

    own, settings = split_settings(arguments)
    return print_script(own, settings) if action == "render" else submit(own, settings)


def split_settings(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a job, and the settings of its run."""
    from genscale.settings.parser import split_flags, take_texts

    cut = arguments.index("--") if "--" in arguments else len(arguments)
    # A flag of a job has no dot: the run's settings are known as such before the -- too.
    settings, own = split_flags(arguments[:cut], lambda name: "." in name)
    files, own = take_texts(own, "--config")
    own += [f"--config={file}" for file in files[:1]]
    return own, [*(f"--config={file}" for file in files[1:]), *settings, *arguments[cut + 1:]]


def _look(action: str, arguments: list[str]) -> int:
    from genscale.cluster import job_control, job_logs, job_status, sweep

    swept = action == "status" and "--sweep" in arguments
    runs, arguments = _runs([word for word in arguments if not swept or word != "--sweep"])
    if action != "logs" and {"-h", "--help"} & set(arguments):
        print(f"usage: genscale slurm {action} {'[--sweep] [RUN ...]' if action == 'status' else 'RUN ...'}\n\n"
              f"{ACTIONS[action]}")
        return exit_codes.DONE
    if action == "resubmit":  # loads torch
        from genscale.cluster.resubmission import resubmit

        return resubmit(runs, arguments)
    act = {"status": sweep.show if swept else job_status.show, "logs": job_logs.follow, "hold": job_control.hold,
           "release": job_control.release, "cancel": job_control.cancel}
    return act[action](runs, arguments)


def _runs(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The run folders, which stand first, and the flags."""
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return [Path(word) for word in arguments[:count]], arguments[count:]
