"""Jobs that were submitted before: once more, held and released, and what they have cost; and sweeps side by side."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from genscale.cluster.job_records import submitted


@pytest.fixture
def slurm(genscale, tool, tiny_config, tmp_path, monkeypatch):
    """`genscale slurm` where sbatch takes every job, numbered from 12 on, and notes its options (`slurm.given()`), and squeue
    says what `slurm.queue()` was told."""
    tool("sbatch", f'echo "$*" >> {tmp_path}/given; echo $((11 + $(wc -l < {tmp_path}/given)))')
    tool("squeue", f"cat {tmp_path}/queue")
    tool("sinfo", "exit 1")
    tool("sacct", "exit 1")
    tool("scontrol", f'[[ $1 == hold || $1 == release ]] && echo "$*" >> {tmp_path}/controlled')
    (tmp_path / "queue").write_text("")
    site = tmp_path / "site.yaml"
    tool("python", "exit 0")  # as the site's setup leads to one
    site.write_text("setup: []\ngpus_per_node: 0\ncpus_per_process: 1\n")

    def run(action, *words):
        if action == "submit":
            words = ("--config", tiny_config, "--site", site, "--launcher", "srun", *words)
        return genscale("slurm", action, *words)

    run.given = lambda: (tmp_path / "given").read_text().splitlines()
    run.queue = lambda *lines: (tmp_path / "queue").write_text("".join(f"{line}\n" for line in lines))
    return run


def test_the_kept_script_is_submitted_again_after_a_fix(slurm, tiny_run):
    assert slurm("submit").code == 0
    script = tiny_run / "jobs" / "0001" / "job.sbatch"
    script.write_text(script.read_text().replace("#SBATCH --time=24:00:00", "#SBATCH --time=30"))
    slurm.queue("12|RUNNING|None|node0|1:00")
    assert "has a job already: 12 (running)" in slurm("resubmit", tiny_run).message()
    slurm.queue()
    done = slurm("resubmit", tiny_run)
    assert done.out.startswith(f"submitted job 13: {tiny_run}\nscript and config: {script.parent}\n"), done.err
    assert "--time=30" in slurm.given()[1].split() and slurm.given()[1].endswith(str(script))
    assert [(each.job, each.log) for each in submitted(tiny_run)] == \
        [(job, f"{tiny_run}/logs/slurm-{job}.log") for job in ("12", "13")]


def test_of_an_array_those_runs_that_are_not_complete(slurm, tiny_run):
    assert slurm("submit", "--array", "seed=3-6%2").code == 0
    runs = [tiny_run.parent / f"tiny-seed{seed}" for seed in range(3, 7)]
    (runs[0] / "ended.json").write_text('{"how": "complete", "exit_code": 0}')
    slurm.queue("12_5|RUNNING|None|node0|1:00")
    done = slurm("resubmit", tiny_run)
    assert done.out.startswith(f"submitted job 13: 2 of 4 runs of {tiny_run}\n"), done.err
    assert slurm.given()[1].split()[-2] == "--array=4,6%2"
    latest = [submitted(run)[-1] for run in runs]
    assert [each.job for each in latest] == ["12_3", "13_4", "12_5", "13_6"]
    assert (latest[1].log, latest[1].settings) == (f"{tiny_run}/logs/slurm-13_4.log", {"run.seed": "4"})
    assert slurm("resubmit", runs[1]).code == 0 and slurm.given()[2].split()[-2] == "--array=4%2"
    for run in runs:
        (run / "ended.json").write_text('{"how": "complete", "exit_code": 0}')
    assert "each of its 4 runs is complete, or has a job" in slurm("resubmit", tiny_run).message()


@pytest.mark.parametrize(("harm", "message"), [
    (lambda run: os.rename(run, run.with_name("other")), "no such run folder"),
    (lambda run: (run / "jobs" / "0001" / "job.sbatch").unlink(), "job.sbatch: cannot be read (No such file or directory)"),
    (lambda run: (run / "jobs" / "0001" / "config.yaml").write_text("train: {steps: 0}"), "train.steps: must be a whole"),
    (lambda run: (run / "jobs" / "0001" / "job.sbatch").write_text("#SBATCH --comment='a\n"), "its #SBATCH lines cannot"),
    (lambda run: (run / "jobs" / "0001" / "job.sbatch").write_text("run=/elsewhere/tiny\n"), "is about another folder than"),
])  # fmt: skip
def test_what_cannot_be_submitted_again(harm, message, slurm, tiny_run):
    assert slurm("submit").code == 0
    harm(tiny_run)
    assert message in slurm("resubmit", tiny_run).message()
    assert len(slurm.given()) == 1


def test_a_run_that_has_moved_is_not_trained_where_it_was(slurm, tiny_run):
    assert slurm("submit").code == 0
    there = tiny_run.parent.rename(tiny_run.parent.with_name("moved")) / "tiny"
    assert f"is about another folder than {there}" in slurm("resubmit", there).message()


def test_jobs_are_held_and_released(slurm, tiny_run, tmp_path):
    assert slurm("submit", "--array", "seed=0-1").code == 0
    slurm.queue("12_0|RUNNING|None|node0|1:00", "12_1|PENDING|Priority||1:00")
    assert slurm("hold", tiny_run).out == "job 12_0 goes on (running), and is held when it is requeued\nheld job 12_1\n"
    assert slurm("release", tiny_run.parent / "tiny-seed1").out == "released job 12_1 (pending)\n"
    assert (tmp_path / "controlled").read_text() == "hold 12_0,12_1\nrelease 12_1\n"
    slurm.queue()
    assert "is in the queue" in slurm("hold", tiny_run).message() and "name the run folders" in slurm("release").message()


def write_lives(run, *lives):
    """(job, seconds or None, gpus) of each; the last one began an hour ago."""
    began = datetime.now(UTC) - timedelta(hours=1)
    entries = [{"job": job, "restart": 0, "nodes": ["a"], "began": began.isoformat(), "step": 0, "gpus": gpus,
                "ended": seconds and (began + timedelta(seconds=seconds)).isoformat()} for job, seconds, gpus in lives]
    (run / "jobs" / "lives.json").write_text(json.dumps({"lives": entries}))


def cost(shown):
    heading, row = shown.out.splitlines()
    return row[heading.index("GPU HOURS"):].split()[0]


def test_gpu_hours_over_all_lives(slurm, tool, tiny_run):
    assert slurm("submit").code == 0
    assert cost(slurm("status", tiny_run)) == "-"
    write_lives(tiny_run, ("12", 1800, 8), ("12", 900, 16), ("12", None, 16))
    assert cost(slurm("status", tiny_run)) == "8.0"  # of the last nobody knows more than that it began
    slurm.queue("12|RUNNING|None|node0|1:00")
    assert cost(slurm("status", tiny_run)) == "24.0"
    tool("sacct", '[[ $* == *--duplicates*--jobs=12* ]] && echo "12|1800|cpu=8,gres/gpu=8,node=1" && '
                  'echo "12|3600|gres/gpu:a100=4,gres/gpu:h100=4" && echo "13|1|cpu=1"')
    assert cost(slurm("status", tiny_run)) == "12.0"


def test_a_life_notes_its_gpus(genscale, run, in_job):
    in_job("7", SLURM_GPUS_ON_NODE="4", ACCELERATE_USE_CPU="true")  # there are none here
    assert genscale("slurm", "begin", run).code == 0
    assert json.loads((run / "jobs" / "lives.json").read_text())["lives"][0]["gpus"] == 4


def test_a_sweep_side_by_side(slurm, tiny_run, monkeypatch):
    assert slurm("submit", "--array", "seed=0-1", "--array", "optimizer.lr=1e-3,3e-4").code == 0
    for number, (lr, seed) in enumerate((lr, seed) for lr in ("1e-3", "3e-4") for seed in (0, 1)):
        run = tiny_run.parent / f"tiny-seed{seed}-lr{lr}"
        if (lr, seed) == ("3e-4", 1):
            continue  # still waits
        records = [{"step": 6, "loss": 2.0 + number, "step_seconds": 1.0}, {"step": 6, "validation_loss": 3.0 - number / 2}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (run / "ended.json").write_text('{"how": "complete", "exit_code": 0}')
    slurm.queue("12_3|PENDING|Priority||1:00")
    shown = slurm("status", "--sweep", tiny_run).out.splitlines()
    assert shown[0] == f"{tiny_run}: 4 runs: 3 complete, 1 queued"
    assert shown[1].split() == ["RUN", "run.seed", "optimizer.lr", "STATE", "STEP", "loss", "validation_loss"]
    assert [line.split() for line in shown[2:6]] == [
        ["tiny-seed0-lr3e-4", "0", "3e-4", "complete", "6/6", "4.0000", "2.0000"],
        ["tiny-seed1-lr1e-3", "1", "1e-3", "complete", "6/6", "3.0000", "2.5000"],
        ["tiny-seed0-lr1e-3", "0", "1e-3", "complete", "6/6", "2.0000", "3.0000"],
        ["tiny-seed1-lr3e-4", "1", "3e-4", "queued", "0/6", "-", "-"]]
    assert shown[6:] == ["optimizer.lr=1e-3: validation_loss 2.7500 +- 0.3536 over 2 seeds"]
    monkeypatch.chdir(tiny_run.parent.parent)
    assert slurm("status", tiny_run.parent / "tiny-seed0-lr1e-3", "--sweep").out.splitlines() == shown
    assert slurm("status", "--sweep").out.splitlines()[1:] == shown[1:]


def test_a_run_alone_is_no_sweep(slurm, tiny_run):
    assert slurm("submit").code == 0
    assert "had no array of runs" in slurm("status", "--sweep", tiny_run).message()
