"""The script of a job, for sbatch and for people: what `slurm/*.sbatch` are, and `genscale slurm submit` submits."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from genscale.cluster import steps
from genscale.cluster.environment import cleaning, communication
from genscale.cluster.job import Job
from genscale.cluster.job_life import FRUITLESS_LIVES
from genscale.cluster.site import Site


@dataclass(frozen=True)
class Training:
    """What a job trains.

    Attributes:
        config: the YAML file, as its path from where the job starts.
        run: the run folder, or what the names of an array's run folders begin with.
        settings: what overrides the file, as `genscale train` takes it.
        collective_seconds: how long a collective of the run may wait; of the runs of an array, the longest.
        goes_on: whether a life after the first goes on from the latest checkpoint as it is; False where `run.resume` says
            otherwise, which is for the first only.
        workers: `data.workers`; of the runs of an array, the most.
        submitted_with: the flags of `genscale slurm submit`, as they are typed, for the run to say what to type next.
        code: the job's copy of genscale (see `snapshot`), as its path from where the job starts; None: what Python finds.
    """

    config: str
    run: str
    settings: Sequence[str] = ()
    collective_seconds: int = 1800
    goes_on: bool = True
    workers: int = 0
    submitted_with: str | None = None
    code: str | None = None


CODE = re.compile(r"^export GENSCALE_CODE=.*$", re.MULTILINE)
"""The line of a script that says where the job's copy of genscale is."""
STOP_AT_LINE = [
    "stop_at_line() { trap - ERR EXIT DEBUG",
    "    stop \"site.setup: exit code $1 of \\`$(sed -n \"${at_line}p\" \"$0\")\\`\" $SLURMD_NODENAME; }",
    "trap '((LINENO == 1)) || at_line=$LINENO' DEBUG; trap 'stop_at_line $?' ERR EXIT",
]


def render(job: Job, site: Site, training: Training, output: str | None = None) -> str:
    """The script.

    Args:
        output: where Slurm writes what the job prints, with its own placeholders; None: beside where the job starts.
    """
    array = job.array
    output = output or ("%x-%A_%a.log" if array else "%x-%j.log")
    parts = [_head(job, output), _which_job(job), _what_it_trains(job, training), _environment(job, site, training),
             _meeting(job, training), *([_before(site)] if site.node_setup or site.pre_commands else []),
             _life(job, site, training)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _head(job: Job, output: str) -> list[str]:
    tasks = job.processes_per_node if job.launcher == "srun" else 1
    what = f"{job.nodes} node{'s' if job.nodes > 1 else ''}"
    if job.array:
        what = f"An array of runs, each on {what}"
    else:
        what = f"A run on {what}"
    return [
        "#!/bin/bash",
        f"# {what}, as `genscale slurm render` writes it. Submit it with sbatch, in the folder that genscale was",
        "# cloned into.",
        "#",
        "# -- to change: what it asks for (and below, what it trains)",
        f"#SBATCH --job-name={shlex.quote(job.name)}",
        f"#SBATCH --nodes={job.nodes}",
        *(f"#SBATCH {option}" for option in job.gpus.option),
        f"#SBATCH --time={job.time}",
        *([f"#SBATCH --array={job.array.for_sbatch()}"] if job.array else []),
        _or_remark("partition", job.partition),
        _or_remark("account", job.account),
        *(f"#SBATCH {shlex.quote(option)}" for option in job.options),
        "#",
        f"# -- one task a {'process' if tasks > 1 or job.launcher == 'srun' else 'node'}, with its CPU cores",
        f"#SBATCH --ntasks-per-node={tasks}",
        f"#SBATCH --cpus-per-task={job.processes_per_node * job.cpus_per_process // tasks}",
        f"# -- {job.lead} s before the limit every training process is told (without B:, which would tell this shell only);",
        "#    the run then writes a checkpoint and ends, and the job requeues itself",
        f"#SBATCH --signal={job.signal}@{job.lead}",
        "#SBATCH --requeue",
        "# -- else a requeue would empty the log",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={shlex.quote(output)}",
    ]


def _or_remark(option: str, value: str | None) -> str:
    """An option, or a line to make one of."""
    return f"#SBATCH --{option}={value}" if value else f"##SBATCH --{option}=...  (take away a #; else it is the cluster's own)"


def _which_job(job: Job) -> list[str]:
    # In an array the last element's SLURM_JOB_ID is that of the whole array.
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID"
    return [
        "# -- only what Slurm gave this job: the rest is of whoever submitted it, from inside another job perhaps",
        *cleaning(array=job.array is not None, gpus=job.gpus_per_node > 0),
        f"job={own}",
        'if [ -n "$SLURM_RESTART_COUNT" ]; then  # which Slurm leaves as it was in the first life of a job',
        '    case " $(scontrol --oneliner show job "$job") " in *" Restarts=0 "*) unset SLURM_RESTART_COUNT ;; esac',
        "fi",
    ]


def _what_it_trains(job: Job, training: Training) -> list[str]:
    lines = [f"config={shlex.quote(training.config)}"]
    if job.array is None:
        lines += [f"run={shlex.quote(training.run)}", f"settings=({shlex.join(training.settings)})"]
    else:
        lines += job.array.script(training.run, training.settings)
    lines[-1] += '  # override those of the file'
    lines.append('settings+=(--run.dir "$(dirname "$run")" --run.name "$(basename "$run")")')
    if not training.goes_on:
        lines.append('[ -z "$SLURM_RESTART_COUNT" ] || settings+=(--run.resume auto)  # from its latest checkpoint')
    if training.code:
        lines += ["# -- genscale as it was when the job was submitted: what all lives of the job run", code_line(training.code)]
    return lines


def code_line(code: str) -> str:
    """What `CODE` finds, for a copy of genscale there."""
    return f"export GENSCALE_CODE={'' if os.path.isabs(code) else '$PWD/'}{shlex.quote(code)}"


def _stop(job: Job) -> list[str]:
    """What the script does where a life cannot begin, and how it has the job started once more."""
    again = FRUITLESS_LIVES - 1
    return [
        "# -- the job once more, without the nodes that are not fit",
        "requeue() {",
        "    trap '' TERM  # which the requeue sends to this shell",
        "    for try in {1..60}; do  # Slurm's controller may be away for minutes",
        '        if scontrol requeue "$job"; then',
        '            [ -s "$run/jobs/exclude" ] || exit 0',
        '            others=$(squeue --noheader --jobs="$job" --format=%x)  # that are left out already',
        '            without=${others:+$others,}$(cat "$run/jobs/exclude")',
        '            all=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N 2>/dev/null | sort -u)',
        '            left=$(grep -cvxF "$(scontrol show hostnames "$without")" <<<"$all")',
        '            if [ -n "$all" ] && [ "$left" -lt "$SLURM_NNODES" ]; then  # it would wait for ever',
        '                echo "genscale: job $job: $without is not left out: the partition has $left other nodes"',
        "            else",
        '                scontrol update JobId="$job" ExcNodeList="$without"',
        "            fi",
        "            exit 0",
        "        fi",
        "        sleep 10",
        "    done",
        "    exit 1",
        "}",
        "# -- what cannot begin ends the job; one that has lived may do better on another node, but not for ever",
        "tell() {",
        '    echo "error: job $job: $1" >&2',
        '    { echo "$(date -u +%FT%T+00:00) job $job: $1" >>"$run/jobs/events.log"; } 2>/dev/null',
        "}",
        "stop() {  # REASON [NODE]",
        f'    if [ -s "$run/jobs/lives.json" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_requeues} ] &&',
        f'        [ "$(tail -n {again} "$run/jobs/events.log" | grep -c "; requeued, for it has lived")" -lt {again} ]; then',
        '        tell "$1; requeued, for it has lived before${2:+, without $2}"',
        '        echo -n "$2" >"$run/jobs/exclude"; requeue',
        "    fi",
        '    tell "$1"; exit 1',
        "}",
    ]


def _environment(job: Job, site: Site, training: Training) -> list[str]:
    lines = [*_stop(job), "", "# -- the environment of the site; a line that fails is named"]
    if setup := site.setup_lines(job.container):
        lines += [*site.module_lines(), *STOP_AT_LINE, *setup, "trap - ERR EXIT DEBUG"]
    exports = dict(site.environment)
    if (folder := site.scratch_folder()) and "HF_HOME" not in exports:
        home = shlex.quote(f"{folder}/huggingface")
        lines += [f"[ -e {home}/token ] ||  # else the user's own login, which is looked for in HF_HOME",
                  "    export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/huggingface}/token}",
                  f"export HF_HOME={home}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    threads = "$SLURM_CPUS_PER_TASK" if job.launcher == "srun" else "$((SLURM_CPUS_PER_TASK / LOCAL_WORLD_SIZE))"
    here = f"${{SLURM_GPUS_ON_NODE:={job.gpus_per_node}}}  # on each node: one a GPU" if job.gpus_per_node else \
        f"{job.processes_per_node}  # on each node"
    lines += [
        "",
        "# -- the environment of the processes",
        f"export {'SLURM_GPUS_ON_NODE ' if job.gpus_per_node else ''}LOCAL_WORLD_SIZE={here}",
        f"export OMP_NUM_THREADS={threads}  # each process has its own cores",
    ]
    if not job.gpus_per_node:
        lines.append("export CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu  # on the CPU, whatever else the node has")
    variables = communication('$run/logs', training.collective_seconds, site.network_interface)
    width = max(len(f"export {each.name}={each.value}") for each in variables)
    return lines + [f"{f'export {each.name}={each.value}':<{width}}  # {each.why}" for each in variables]


def _meeting(job: Job, training: Training) -> list[str]:
    return [
        "# -- where the processes meet: on the first of the job's nodes, at a port that each life looks for",
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && [ -n "$nodes" ] ||',
        "    { echo \"error: scontrol show hostnames names no node of '$SLURM_JOB_NODELIST'\" >&2; exit 1; }",
        "export MASTER_ADDR=${nodes%%$'\\n'*} GENSCALE_NODES=$nodes GENSCALE_RUN=$run",
        *([] if training.submitted_with is None else
          [f"export GENSCALE_SUBMIT={shlex.quote(training.submitted_with)}  # for the run to say what to type next"]),
        "# When to stop, should the signal come while no process listens yet.",
        'ends=$(squeue --noheader --jobs="$job" --format=%e)',
        'if [ -n "$ends" ] && ends=$(date -d "$ends" +%s 2>/dev/null); then',
        '    if [ "$ends" -gt "$(date +%s)" ]; then',
        f"        export GENSCALE_STOP_AT=$((ends - {job.lead}))",
        "    else",
        '        echo "genscale: job $job: by squeue it ended at $(date -d "@$ends"), so it goes by the signal alone"',
        "    fi",
        "fi",
    ]


def _before(site: Site) -> list[str]:
    lines = []
    if site.node_setup:
        lines += ["# -- before the training, on every node",
                  "srun --export=ALL --nodes=\"$SLURM_NNODES\" --ntasks=\"$SLURM_NNODES\" --ntasks-per-node=1 --mem=0 \\",
                  "    --cpus-per-task=\"$SLURM_CPUS_PER_TASK\" --kill-on-bad-exit=1 bash -c '",
                  '    failed() { echo "error: $SLURMD_NODENAME: site.node_setup: exit code $? of \\`$line\\`" >&2; exit 1; }',
                  '    trap failed EXIT; for line; do eval "$line" || exit; done; trap - EXIT',
                  f"' setup {shlex.join(site.node_setup)} ||",
                  "    stop 'site.node_setup: a command has failed on a node (the line above names both)'"]
    if site.pre_commands:
        lines += ["# -- before the training, on the first node",
                  "trap 'stop \"site.pre_commands: exit code $? of \\`$line\\`\" $SLURMD_NODENAME' EXIT",
                  f"for line in {shlex.join(site.pre_commands)}; do eval \"$line\" || exit; done", "trap - EXIT"]
    return lines


def _after(site: Site) -> list[str]:
    return ["# -- after the training, on the first node, whatever becomes of it",
            f"for line in {shlex.join(site.post_commands)}; do",
            '    (eval "$line") || echo "genscale: job $job: site.post_commands: exit code $? of \\`$line\\`" >&2', "done"]


def _life(job: Job, site: Site, training: Training) -> list[str]:
    inside, container = steps.inside(job, site), steps.srun_container(job, site, training.run)
    python = 'python "$GENSCALE_CODE"' if training.code else "python -m genscale"
    # What ends a life runs in the container too, and there only srun leads.
    here = '"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" ' if container else inside
    cap = f"--max-requeues {job.max_requeues}"
    return [
        "# -- one life of the job. A task that has ended leaves the others in peace for a while, however it ended: it may have",
        "#    been the first to answer a signal",
        'step=(srun --export=ALL --nodes="$SLURM_NNODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" --mem=0 --kill-on-bad-exit=0)',
        *([f"step+=({' '.join(container)})"] if container else []),
        "",
        "# -- its beginning looks at every node and counts the life; 10: the run is complete",
        '"${step[@]}" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --wait=300 \\',
        f'    {inside}{python} slurm begin "$run" {cap} --workers {training.workers}  # data.workers',
        "code=$?",
        '[ "$code" = 10 ] && exit 0',
        'if [ "$code" = 0 ]; then',
        '    export MASTER_PORT=$(cat "$run/jobs/port")',
        *(f"    {line}" for line in (steps.with_srun(job, inside + python) if job.launcher == "srun"
                                  else steps.with_accelerate(inside, inside + python, training.code is not None))),
        "    code=$?",
        "fi",
        "",
        "# -- its end, as the run folder tells it, for no exit code comes through a launcher; 75: there is to be another life",
        f'{here}{python} slurm end "$run" --code "$code" {cap}',
        "code=$?",
        f'[ "$code" = 0 ] || [ "$code" = 75 ] || {here}{python} --version >/dev/null ||',
        '    stop "genscale cannot be started on $SLURMD_NODENAME (the log says why)" $SLURMD_NODENAME',
        *(_after(site) if site.post_commands else []),
        '[ "$code" = 75 ] || exit "$code"',
        "requeue",
    ]
