"""How the script of a job starts its programs: by srun, in a container or not, through Accelerate's launcher or without."""

from __future__ import annotations

import os
import re
import shlex

from genscale.cluster.job import Job
from genscale.cluster.site import Site
from genscale.errors import UserError


def inside(job: Job, site: Site) -> str:
    """What a program is started with, in the job's container; empty where srun puts it there."""
    if not job.container or site.container_kind == "pyxis":
        return ""
    return " ".join(map(_in_double_quotes, [*shlex.split(site.container_command), job.container])) + " "


def _in_double_quotes(word: str) -> str:
    """Where it needs any: for a variable in it to be replaced, and since it may stand between single ones."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else f'"{word}"'


def srun_container(job: Job, site: Site, run: str) -> list[str]:
    """srun's options for the job's container, where it is one of pyxis."""
    if not job.container or site.container_kind != "pyxis":
        return []
    folders = ["$PWD", *filter(None, [site.scratch_folder()]), *([os.path.dirname(run)] if os.path.isabs(run) else [])]
    if odd := next((folder for folder in folders if re.search(r"[:,]", folder)), None):
        raise UserError(f"run.dir: {odd} has a colon or a comma, and cannot be mounted in a container of pyxis; choose another")
    mounts = [*(f"{folder}:{folder}" for folder in dict.fromkeys(folders)),
              *(each if ":" in each else f"{each}:{each}" for each in site.container_mounts)]
    return [f"--container-image={_in_double_quotes(job.container)}", f'--container-mounts="{",".join(mounts)}"',
            '--container-workdir="$PWD"']


def with_accelerate(inside: str, python: str, copied: bool) -> list[str]:
    """The training, by Accelerate's launcher: one task a node.

    Args:
        inside: what a program is started with, in the job's container.
        python: starts genscale there.
        copied: whether that is the job's copy of it.
    """
    file, program = "launch/ddp.yaml", "--module genscale"
    if copied:
        file, program = f'"$GENSCALE_CODE/{file}"', '"$GENSCALE_CODE/__main__.py"'
    return [
        '"${step[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=cores --wait=60 bash -c \'',
        "    # Signals are for the training processes. The launcher would die of them, and leave those behind.",
        '    trap "" USR1 USR2 TERM INT; export PET_SIGNALS_TO_HANDLE=SIGQUIT',
        "    # `accelerate launch`, without the imports of its other commands: a third of the time until the processes start",
        f"    {inside}python -m accelerate.commands.launch --config_file {file} \\",
        '        --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$1" \\',
        '        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --same_network \\',
        f'        --num_cpu_threads_per_process "$OMP_NUM_THREADS" {program} train "${{@:2}}"',
        *_word(python),
        "' launch $((SLURM_NNODES * LOCAL_WORLD_SIZE)) --config \"$config\" \"${settings[@]}\"",
    ]


def with_srun(job: Job, python: str) -> list[str]:
    """The training, by srun alone: one task a process."""
    own, rank = "", "$SLURM_LOCALID"
    if job.gpus_per_task:  # of which each process sees one, as device 0
        own, rank = f"--gpus-per-task={job.gpus.kind + ':' if job.gpus.kind else ''}1 ", "0"
    return [
        '"${step[@]}" --ntasks=$((SLURM_NNODES * LOCAL_WORLD_SIZE)) --ntasks-per-node="$LOCAL_WORLD_SIZE" \\',
        f"    {own}--cpu-bind=cores --wait=60 bash -c '",
        f"    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK={rank}",
        "    trap : USR1 USR2 TERM INT HUP  # which are for the training process",
        f"    {python} train \"$@\"",
        *_word(python),
        "' train --config \"$config\" \"${settings[@]}\"",
    ]


def _word(python: str) -> list[str]:
    return ["    # Who was killed leaves no word, and the others may wait for it for long.",
            '    code=$?; [ "$code" = 0 ] || [ -e "$GENSCALE_RUN/ended.json" ] ||',
            f'        {python} slurm lost "$GENSCALE_RUN" --code "$code"',
            '    exit "$code"']
