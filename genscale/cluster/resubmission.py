"""genscale slurm resubmit: the latest job of a run once more, as its script was kept (and perhaps mended since), with the code
as it is now. To go on with the code that it had: `python RUN/jobs/code-DIGEST slurm resubmit RUN`."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from genscale.checkpoint.code_version import code_in
from genscale.cluster import slurm_commands
from genscale.cluster.before_submission import LAUNCH_FILE, check_is_free, check_launch_file
from genscale.cluster.job_records import Submitted, active_jobs, record, submitted
from genscale.cluster.job_status import chosen
from genscale.cluster.lives import read_ended
from genscale.cluster.script import CODE, code_line
from genscale.cluster.slurm_commands import options_in
from genscale.cluster.snapshot import take
from genscale.cluster.submission import log_of, what_next
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.inspection.config_check import check_config
from genscale.settings.parser import load_config
from genscale.writing import write_whole

SCRIPT, CONFIG = "job.sbatch", "config.yaml"


def resubmit(folders: Sequence[Path], arguments: Sequence[str]) -> int:
    """Submit again, of an array those runs that are not complete and have no job. Raises UserError, and then the jobs of those
    folders that were named before have been submitted."""
    if not folders:
        raise UserError("genscale slurm resubmit: name the run folders whose jobs are to be submitted again")
    slurm_commands.need("sbatch")
    for folder in chosen(folders, arguments, "resubmit"):
        _resubmit(folder)
    return 0


def _resubmit(folder: Path) -> None:
    entries = submitted(folder)
    if not entries:
        raise UserError(f"{folder}: no job was submitted for it with `genscale slurm submit`")
    entry = entries[-1]
    script = Path(entry.kept) / SCRIPT
    try:
        text = script.read_text()
        options = options_in(text)
    except OSError as error:
        raise UserError(f"{script}: cannot be read ({error.strerror}); submit the run anew") from None
    except ValueError as error:
        raise UserError(f"{script}: its #SBATCH lines cannot be read ({error}); mend them, or submit the run anew") from None
    _check_place(script, text)
    runs = _to_train(folder, entry)
    for run in runs:
        _check_config(run, script.parent / CONFIG, runs[run].settings, _world_size(text, options))
    code = _with_new_code(script, text)
    number = slurm_commands.submit(str(script), options=_elements(entry, runs, options))
    _note(folder, entry, runs, number, _output(options))
    what = f"{len(runs)} of {len(entry.runs)} runs of {folder}" if _is_array(entry) else str(folder)
    print(f"submitted job {number}: {what}\nscript and config: {script.parent}{code}\n\n{what_next(folder)}")


def _with_new_code(script: Path, text: str) -> str:
    """The script is led to the code as it is now, for a fix may be in that. (One that goes by no copy stays so.)

    Returns: what to say of it. Raises UserError.
    """
    if not CODE.search(text):
        return ""
    try:
        code = take(script.parent.parent.parent, str(LAUNCH_FILE) in text).keep()
        write_whole(script, CODE.sub(lambda _: code_line(str(code)), text))
    except OSError as error:
        raise UserError(f"{script.parent.parent}: cannot be written ({error.strerror}); free some space") from None
    return f"\ncode: {code_in(code)}"


def _to_train(folder: Path, entry: Submitted) -> dict[Path, Submitted]:
    """The runs, each with how it was submitted before. Raises UserError where none of them is to be trained."""
    queue = slurm_commands.queue()
    if not _is_array(entry):
        check_is_free(folder, queue)
        return {folder: entry}
    left = {}
    for run in map(Path, entry.runs):
        before = next((each for each in reversed(submitted(run)) if each.kept == entry.kept), None)
        if before is not None and not _is_complete(run) and not active_jobs([run], queue):
            check_is_free(run, queue)
            left[run] = before
    if not left:
        raise UserError(f"{folder}: each of its {len(entry.runs)} runs is complete, or has a job")
    return left


def _is_array(entry: Submitted) -> bool:
    return entry.log is None


def _index(entry: Submitted) -> str:
    """Slurm's number of an element of an array; empty for a job that is none."""
    return entry.job.partition("_")[2]


def _elements(entry: Submitted, runs: Mapping[Path, Submitted], options: Sequence[str]) -> list[str]:
    """The option that leaves out what is not to be trained."""
    indices = [_index(each) for each in runs.values()]
    if not indices[0] or (_is_array(entry) and len(runs) == len(entry.runs)):
        return []
    array = next((option for option in options if option.startswith("--array=")), "")
    return [f"--array={','.join(indices)}{''.join(array.partition('%')[1:])}"]  # as many at a time as before


def _is_complete(run: Path) -> bool:
    return (read_ended(run) or {}).get("how") == "complete"


def _check_place(script: Path, text: str) -> None:
    """That the script leads to the folder that it was kept in: its paths go by where it is submitted."""
    found = re.search(r"^run=(?P<word>(?:'[^']*'|[^$\s'])+)", text, re.MULTILINE)
    base = os.path.realpath(script.parent.parent.parent)
    if found is None or not os.path.realpath("".join(shlex.split(found["word"]))).startswith(base):
        raise UserError(f"{script}: is about another folder than {base}, as seen from {Path.cwd()}; go to the folder that it "
                        "was submitted from, or submit the run anew")
    if str(LAUNCH_FILE) in text and not CODE.search(text):
        check_launch_file()


def _check_config(run: Path, file: Path, settings: dict[str, str], processes: int) -> None:
    """What was wrong with the run may still be. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: is not there; submit the run anew")
    own = [f"--{key}={value}" for key, value in settings.items()]
    check_config(load_config(FAMILIES, file, [*own, "--run.dir", str(run.parent), "--run.name", run.name]), processes)


def _world_size(text: str, options: Sequence[str]) -> int:
    """The number of processes that the script starts."""
    nodes = next((int(value) for option in options if (value := option.removeprefix("--nodes=")).isdigit()), 1)
    here = re.search(r"^export LOCAL_WORLD_SIZE=(?:\$\{SLURM_GPUS_ON_NODE:-)?(\d+)", text, re.MULTILINE)
    return nodes * (int(here[1]) if here else 1)


def _output(options: Sequence[str]) -> str:
    return next((option.partition("=")[2] for option in options if option.startswith("--output=")), "")


def _note(folder: Path, entry: Submitted, runs: Mapping[Path, Submitted], number: str, output: str) -> None:
    for run, before in runs.items():
        job = f"{number}_{_index(before)}" if _index(before) else number
        record(run, Submitted(job, entry.kept, log_of(output, job), (str(run),), before.settings))
    if _is_array(entry):
        record(folder, Submitted(number, entry.kept, None, entry.runs))
