"""The verbs. Each is a few lines into one room; `genscale VERB --help` lists its settings."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from genscale import __version__, exit_codes
from genscale.cluster.slurm_task import adopt_slurm_task, is_slurm_task
from genscale.errors import UserError, nearest
from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launcher import follow_launcher
from genscale.printable import OutputLost, occupy_closed_streams, printed_as_is, show_printable
from genscale.supervise.signals import Stopped, StopSignal

VERBS = {
    "train": "train a model as a YAML config says; resumes by itself",
    "plan": "memory, time and money of a run on GPUs that need not be here, before it runs; and what would be better",
    "configs": "list the configs that genscale brings, for --config NAME",
    "sample": "generate from a trained run",
    "evaluate": "loss and other scores of a trained run on a data set",
    "export": "write a trained run as a Hugging Face folder",
    "families": "what model.family can be, and the data sources and hooks of installed packages",
    "rewards": "what objective.rewards can name, with its settings",
    "tokenizer": "train a byte-level BPE tokenizer",
    "data": "fill the token cache ahead of a run, or see what a run would train on",
    "compare": "the first step at which two runs differ, and in what",
    "check-family": "whether a family keeps the promise under every strategy, killed and resized",
    "checkpoint": "list, verify, digest or consolidate checkpoints",
    "slurm": "train on a cluster: render, submit, status, logs, cancel, and more",
    "sync": "upload a run's offline W&B records, however many lives it had, as one W&B run",
    "doctor": "what is wrong with this machine, or with the nodes of a job, before a run finds out",
}

PRINTING = {"plan", "sample", "evaluate", "compare", "configs", "doctor", "families", "rewards", "check-family",
            "checkpoint list", "checkpoint verify", "checkpoint digest", "data inspect", "slurm render", "slurm status",
            "slurm logs"}
"""What is there for what it prints."""


def start(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as the whole of a process, which ends with its exit code."""
    occupy_closed_streams()
    show_printable()
    if "RANK" in os.environ or is_slurm_task():  # one of a group
        run_and_leave(lambda: main(arguments))
    sys.exit(main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code (see `genscale.exit_codes`)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else exit_codes.USER_ERROR
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):  # as they were, at the end
        show_printable(_output_is_product(verb, rest))
        code = exit_codes.DONE
        try:
            with printed_as_is() if verb == "sample" else contextlib.nullcontext():
                try:
                    code = guarded(lambda: _verb(verb)(rest))
                finally:
                    sys.stdout.flush()
        except OutputLost as lost:
            if not lost.reader_gone:  # else `genscale ... | head`
                print(f"error: standard output cannot be written: {lost}; free some space, or send it elsewhere",
                      file=sys.stderr)
                code = code or exit_codes.USER_ERROR
        return code


def _output_is_product(verb: str, rest: Sequence[str]) -> bool:
    """Whether what goes to standard output is what the verb is there for. Else it only tells of the work, which goes on
    without it."""
    if {"-h", "--help"} & set(rest) or any(word.startswith("--print_config") for word in rest):
        return True
    return verb in PRINTING or f"{verb} {''.join(rest[:1])}" in PRINTING


def guarded(run: Callable[[], int]) -> int:
    """A user's mistake is one line, printed by rank 0 alone; our own bugs keep their traceback."""
    try:
        return run()
    except UserError as error:
        if int(os.environ.get("RANK", "0")) > 0 and not error.alone:
            # Launchers end all processes as soon as one fails: rank 0, which has the same error as a rule, must be the first.
            # Whoever is still alive afterwards was alone with it.
            time.sleep(10)
        with contextlib.suppress(OutputLost):
            sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_codes.USER_ERROR
    except Stopped as stopped:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"stopped by {stopped.signal.name} before the first step", file=sys.stderr, flush=True)
        return exit_codes.of_signal(stopped.signal)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exit_codes.of_signal(signal.SIGINT)


def _verb(verb: str) -> Callable[[list[str]], int]:
    # Imported one at a time: torch takes seconds to load, and `--help` of another verb need not wait for it.
    if verb == "train":
        run = _train
    elif verb == "plan":
        from genscale.verbs.plan import main as run
    elif verb == "configs":
        from genscale.verbs.configs import main as run
    elif verb == "sample":
        from genscale.verbs.sample import main as run
    elif verb == "evaluate":
        from genscale.verbs.evaluate import main as run
    elif verb == "export":
        from genscale.verbs.export import main as run
    elif verb == "families":
        from genscale.verbs.families import main as run
    elif verb == "rewards":
        from genscale.verbs.rewards import main as run
    elif verb == "tokenizer":
        from genscale.verbs.tokenizer import main as run
    elif verb == "data":
        from genscale.verbs.data import main as run
    elif verb == "compare":
        from genscale.verbs.compare import main as run
    elif verb == "check-family":
        from genscale.verbs.check_family import main as run
    elif verb == "checkpoint":
        from genscale.verbs.checkpoint import main as run
    elif verb == "slurm":
        from genscale.verbs.slurm import main as run
    elif verb == "sync":
        from genscale.verbs.sync import main as run
    elif verb == "doctor":
        from genscale.verbs.doctor import main as run
    else:
        raise UserError(f"'{verb}' is not a verb of genscale{nearest(verb, VERBS)}; verbs: {', '.join(VERBS)}")
    return run


def _train(arguments: list[str]) -> int:
    adopt_slurm_task()  # `srun -n 4 genscale train` is one run
    follow_launcher(starting=True)
    with StopSignal(starting=True) as stop:  # before the import, during which a scheduler may already want the machine back
        from genscale.verbs.train import main as run

        return run(arguments, stop)


def _usage() -> str:
    lines = [f"genscale {__version__}: trains generative models at any scale", "", "usage: genscale VERB [settings]", ""]
    lines += [f"  {verb:<14}{meaning}" for verb, meaning in VERBS.items()]
    return "\n".join([*lines, "", "`genscale VERB --help` lists every setting of a verb."])
