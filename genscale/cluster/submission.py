"""From a run's config to a job in the queue; whatever is wrong with either is found before that."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_type_hints

from genscale.checkpoint.code_version import code_in
from genscale.cluster import slurm_commands
from genscale.cluster.before_submission import check_is_free, check_launch_file, check_setup
from genscale.cluster.doctor import submission_check
from genscale.cluster.job import JobSettings
from genscale.cluster.job_records import Submitted, new_folder, record
from genscale.cluster.partition import check_fits, find_partition
from genscale.cluster.planned_memory import check_memory
from genscale.cluster.prepared_job import Prepared, check_configs, prepare_job, without
from genscale.cluster.script import render
from genscale.cluster.snapshot import Snapshot, take
from genscale.errors import UserError
from genscale.settings.parser import parse_settings
from genscale.writing import make_folder

OF_THIS_JOB = ("--config", "--array", "--after", "--begin", "--dependency")
"""Flags that another job of the run would not have."""


@dataclass
class RenderSettings(JobSettings):
    """The script of a job."""

    out: str | None = None
    """File to write it to (default: it is printed)."""


@dataclass
class SubmitSettings(JobSettings):
    """A job to submit."""

    dry_run: bool = False
    """Show the script, and have Slurm say when and where the job would start; submit nothing. (As in a real submission, the
    modules and lines of site.setup are run here, to see that they lead to genscale.)"""
    no_snapshot: bool = False
    """Let each life of the job run genscale as it finds it then (default: a copy of it as it is now, kept with the job)."""
    no_plan: bool = False
    """Submit what by `genscale plan` would not fit into the memory of the GPUs."""


def print_script(arguments: Sequence[str], settings: Sequence[str]) -> int:
    """genscale slurm render. Raises UserError."""
    asked = parse_settings(RenderSettings, _gathered(arguments), "genscale slurm render", "Write the script of a job.")
    prepared = prepare_job(asked, settings)
    script = render(prepared.job, prepared.site, prepared.training)
    if asked.out is None:
        print(script, end="")
        return 0
    try:
        Path(asked.out).write_text(script)
    except OSError as error:
        raise UserError(f"--out: cannot write {asked.out} ({error.strerror})") from None
    print(asked.out)
    return 0


def _gathered(arguments: Sequence[str]) -> list[str]:
    """With each flag that may be repeated as one list."""
    flags = [name for name, kind in get_type_hints(JobSettings).items() if kind == list[str]]
    values: dict[str, list[str]] = {f"--{flag}": [] for flag in flags}
    rest, words = [], iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in values:
            rest.append(word)
        elif value := value if equals else next(words, ""):
            values[flag].append(value)
        else:
            raise UserError(f"{flag}: needs a value, as in `{flag} VALUE`")
    return rest + [f"{flag}={json.dumps(given)}" for flag, given in values.items() if given]


def submit(arguments: Sequence[str], settings: Sequence[str]) -> int:
    """genscale slurm submit. Raises UserError, and then nothing is submitted."""
    asked = parse_settings(SubmitSettings, _gathered(arguments), "genscale slurm submit",
                           "Submit a run, or an array of runs, to Slurm.")
    slurm_commands.need("sbatch")
    again = without([word for word in arguments if word.partition("=")[0] != "--dry-run"], OF_THIS_JOB)
    prepared = prepare_job(asked, settings, shlex.join(again))
    _check(prepared, asked.no_snapshot)
    if not asked.no_plan:
        check_memory(prepared)
    snapshot = None if asked.no_snapshot else take(prepared.folder, prepared.job.launcher == "accelerate")
    if asked.dry_run:
        code = str(snapshot.place) if snapshot else None
        script = render(prepared.job, prepared.site, replace(prepared.training, code=code), _output(prepared))
        print(script)
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(script)
            file.flush()
            print(slurm_commands.submit(file.name, test_only=True))
        return 0
    _keep_and_submit(prepared, snapshot)
    return 0


def _check(prepared: Prepared, no_snapshot: bool) -> None:
    """Raises UserError for what would go wrong on the cluster."""
    from genscale.inspection.config_check import check_config

    job, site = prepared.job, prepared.site
    if job.launcher == "accelerate" and no_snapshot:
        check_launch_file()
    if partition := find_partition(job.partition):
        check_fits(job, partition)
    waiting = slurm_commands.queue()
    for run in prepared.runs():
        check_is_free(run, waiting)
    check_configs(prepared, lambda config: check_config(config, job.world_size))
    for tracking in {each.tracking.wandb: each.tracking for each in prepared.configs}.values():
        for check in submission_check(tracking, prepared.folder, job.nodes):
            if check.state == "failure":
                raise UserError(f"{check.name}: {check.found}; {check.remedy}")
            if check.state == "warning":
                print(f"warning: {check.name}: {check.found}; {check.remedy}", file=sys.stderr)
    if not job.container:
        check_setup(site)


def log_of(output: str, job: str) -> str:
    """Where a job, as Slurm's commands take it, prints to.

    Args:
        output: as sbatch is told.
    """
    number, _, index = job.partition("_")
    words = {"%": "%", "j": number, "A": number, "a": index}
    return re.sub(r"%([%jAa])", lambda found: words[found[1]], output)


def _output(prepared: Prepared) -> str:
    folder = str(prepared.folder).replace("%", "%%")
    return f"{folder}/logs/slurm-{'%A_%a' if prepared.job.array else '%j'}.log"


def _keep_and_submit(prepared: Prepared, snapshot: Snapshot | None) -> None:
    """Script, resolved config and code into the run folder, the job into the queue."""
    from genscale.supervise.run_folder import config_yaml

    job, folder, training = prepared.job, prepared.folder, prepared.training
    before, code = {*folder.glob("jobs/*")}, None
    try:
        kept = new_folder(folder)
        make_folder(folder / "logs")
        (kept / "config.yaml").write_text(config_yaml(prepared.configs[0]))
        code = snapshot.keep() if snapshot else None
        training = replace(training, config=str(kept / "config.yaml"), settings=(), code=str(code) if code else None)
        script = kept / "job.sbatch"
        script.write_text(render(job, prepared.site, training, _output(prepared)))
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder} ({error.strerror}); set --run.dir to a folder you can write to") \
            from None
    try:
        number = slurm_commands.submit(str(script))
    except BaseException:
        for new in {kept, *([code] if code else [])} - before:
            shutil.rmtree(new, ignore_errors=True)
        for path in (folder / "jobs", folder / "logs", folder):  # where there was nothing, there is nothing
            if path.is_dir() and not os.listdir(path):
                path.rmdir()
        raise
    try:
        _record(prepared, number, kept)
    except OSError as error:
        slurm_commands.cancel([number])
        raise UserError(f"run.dir: cannot write to {error.filename or folder} ({error.strerror}), and job {number} was "
                        "cancelled; set --run.dir to a folder you can write to") from None
    what = f"{len(prepared.configs)} runs {folder}-{job.array.axes[0].short}*" if job.array else str(folder)
    print(f"submitted job {number}: {what}, {job.nodes} node{'s' if job.nodes > 1 else ''} x {job.processes_per_node} "
          f"process{'es' if job.processes_per_node > 1 else ''}\nscript and config: {kept}")
    if code:
        print(f"code: {code_in(code)}")
    print(f"\n{what_next(folder)}")


def what_next(folder: Path) -> str:
    """What to type after a job was submitted."""
    word = shlex.quote(str(folder))
    return "next:\n" + "\n".join(f"  genscale slurm {action} {word}" for action in ("status", "logs", "cancel"))


def _record(prepared: Prepared, number: str, kept: Path) -> None:
    folder, runs, output = prepared.folder, prepared.runs(), _output(prepared)
    if prepared.job.array is None:
        record(folder, Submitted(number, str(kept), log_of(output, number), (str(folder),)))
        return
    record(folder, Submitted(number, str(kept), None, tuple(map(str, runs))))
    array = prepared.job.array
    for run, index, element in zip(runs, array.indices(), array.elements(), strict=True):
        job = f"{number}_{index}"
        record(run, Submitted(job, str(kept), log_of(output, job), (str(run),), array.settings_of(element)))
