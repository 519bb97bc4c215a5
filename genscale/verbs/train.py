"""genscale train: one process, or --processes N through Accelerate's launcher; also what train.py runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genscale import exit_codes
from genscale.cluster.promised_devices import check_devices
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.masking import masked
from genscale.parallel.launcher import has_launcher
from genscale.process_settings import wait_longer_if_quiet
from genscale.settings.config import PLAN
from genscale.settings.parser import parse_config, split_flags, take_number
from genscale.supervise.ending import RUN, SUBMIT, before_the_run
from genscale.supervise.signals import StopSignal

if TYPE_CHECKING:
    from genscale.families.entry import Sampling
    from genscale.training.run import RunResult

PROCESSES = "GENSCALE_PROCESSES"

DESCRIPTION = ("Train a model. A run is one YAML file; every setting in it is also a flag. Run it again to continue "
               "from its latest "
               "checkpoint. --processes N starts N processes on this machine; `accelerate launch train.py` takes "
               "the same settings. --audit N trains nothing: it watches the first N steps, says what each term of each "
               "loss does to each network, and ends with exit code 2 where a phase changes a network that it does not "
               "train, a term does nothing, or a sample comes twice.")


def main(arguments: list[str], stop: StopSignal) -> int:
    processes, arguments = take_number(arguments, "--processes", least=1)
    if processes is not None and "RANK" in os.environ:
        raise UserError(f"--processes: {processes} has no effect beside a launcher (or srun) that has started "
                        f"{os.environ.get('WORLD_SIZE', '?')} processes; leave it out")
    audited, settings = take_number(arguments, "--audit", least=1)
    with before_the_run():
        config = parse_config(FAMILIES, settings, description=DESCRIPTION)
    wait_longer_if_quiet()
    from genscale.training.run import train  # torch takes a second to load, --help and mistakes need none
    from genscale.training.setup import derive_accumulation

    if processes is not None:
        from genscale.parallel.launcher import launch_processes
        from genscale.parallel.strategies import check_divides

        if config.train.micro_batch_size != PLAN:
            check_divides("context", config.parallel.context, processes)  # a mistake found here costs no launch
            derive_accumulation(config.train, processes, config.parallel.context)
        os.environ[PROCESSES] = str(processes)  # for the processes to say how to go on
        return launch_processes(processes, arguments, FAMILIES.script, listening=stop.loop_begins)
    if config.train.micro_batch_size == PLAN:
        from genscale.planning.starting import with_planned_size  # which loads all that plans

        with before_the_run():
            config = with_planned_size(config)
    if audited is not None:
        from genscale.inspection.audit import audit

        return exit_codes.DONE if audit(config, audited) else exit_codes.USER_ERROR
    with before_the_run():
        check_devices()
    result = train(config, stop)
    if result.is_main:
        print(farewell(result, settings, family(config.model.family).sampling), flush=True)
    # A launcher takes the code of a signal for a failure: it ends the other processes within 30 seconds, and writes tracebacks
    # into the log. In a job it is ended.json that says how the run ended. Where a launcher is gone, those of other nodes would
    # wait for it after a success.
    silent = RUN in os.environ and has_launcher() and not result.launcher_lost
    return exit_codes.of_signal(result.stopped_by) if result.stopped_by and not silent else exit_codes.DONE


def program() -> str:
    """What runs a verb of genscale: itself, or the script that has registered a family."""
    return f"python {shlex.quote(FAMILIES.script)}" if FAMILIES.script else "genscale"


def command(settings: Sequence[str], drop: Sequence[str] = ()) -> str:
    """What to type to run these settings again, without those that `drop` names."""
    kept, words = [], iter(settings)
    for word in words:
        if word.split("=", 1)[0] in drop:
            if "=" not in word:
                next(words, None)
        else:
            kept.append(shlex.quote(word))
    if RUN in os.environ:
        own, rest = split_flags(kept, lambda name: name == "config")
        asked = os.environ.get(SUBMIT, f"--nodes {os.environ.get('SLURM_NNODES', '1')}")
        return masked(" ".join(["genscale slurm submit", *([asked] if asked else []), *own, "--", *rest]))
    if PROCESSES in os.environ:
        start = f"{program()} train --processes {os.environ[PROCESSES]}"
    elif "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" in os.environ and not has_launcher():
        start = f"srun -n {os.environ['WORLD_SIZE']} {program()} train"
    else:
        start = launched_by_hand() if "RANK" in os.environ else f"{program()} train"
    return masked(" ".join([start, *kept]))


def launched_by_hand() -> str:
    """What starts a run with Accelerate's launcher from here: by the script that has registered a family, in a checkout by its
    train.py, else by the installed package."""
    if FAMILIES.script:
        return f"accelerate launch {shlex.quote(FAMILIES.script)} train"
    return f"accelerate launch {'train.py' if os.path.isfile('train.py') else '--module genscale train'}"


def farewell(result: RunResult, settings: Sequence[str], sampling: Sampling | None) -> str:
    """What the run came to, where it lies, and what to type next."""
    from genscale.parallel.processes import on_cpu
    from genscale.tracking.progress import figure

    folder = result.folder
    if result.stopped_by:
        stopped = (f"\nstopped by {result.stopped_by.name} after step {result.step}; "
                   f"a checkpoint was written to {folder}/checkpoints")
        if RUN in os.environ:  # its job goes on by itself
            return stopped
        return f"{stopped}\ngo on with: {command(settings, drop=['--run.resume'])}"
    lines = [""]
    if isinstance(result.preview, Path):
        lines += [f"sample: {result.preview}"]
    elif result.preview:
        lines += ["sample:", *(f"  | {line}" for line in result.preview.splitlines()), ""]
    scores = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in result.evaluation.items())
    longer = f"{command(settings, drop=['--run.resume', '--train.steps'])} --train.steps {2 * result.step}"
    word, again = shlex.quote(str(folder)), f"--config {shlex.quote(f'{folder}/config.yaml')}"

    def sibling(suffix: str) -> str:
        return f"--run.name {shlex.quote(f'{folder.name}-{suffix}')}"

    lines += [f"validation: {scores}", f"run folder: {folder}", f"loss curve: {folder}/plots/loss.png", "", "next:",
              f"  train on         {longer}"]
    if sampling is not None:
        lines.append(f"  sample           {program()} sample {word} {sampling.example}".rstrip())
    if PROCESSES not in os.environ and "RANK" not in os.environ:
        lines.append(f"  two processes    {program()} train --processes 2 {again} {sibling('2')}")
    if on_cpu():
        lines.append(f"  a GPU            {launched_by_hand()} {again} {sibling('gpu')} --train.precision bf16")
    if any(folder.glob("wandb/offline-run-*")):
        lines.append(f"  see it in W&B    wandb login && {program()} sync {word}")
    else:
        lines.append(f"  see it in W&B    wandb login && {program()} train {again} {sibling('wandb')} --tracking.wandb online")
    return "\n".join(lines)
