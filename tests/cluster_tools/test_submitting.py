"""`genscale slurm submit` as far as Slurm's door: programs that note what they are asked stand in the place of Slurm's own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml

from genscale.cluster.planned_memory import profile_of


@pytest.fixture
def submit(genscale, tool, tiny_config, tmp_path):
    """`submit(*words)` of the tiny run to a Slurm that takes every job as number 12; `submit.jobs()`: how many it was given."""
    given = tmp_path / "given"
    tool("sbatch", f'cat "${{@: -1}}" >> {shlex.quote(str(given))}; echo "#END" >> {shlex.quote(str(given))}; echo 12')
    tool("squeue", "exit 0")
    tool("sinfo", "exit 1")
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"gpus_per_node": 0, "cpus_per_process": 1, "setup": [path]}))

    def run(*words):
        return genscale("slurm", "submit", "--config", tiny_config, "--site", site, "--launcher", "srun", *words)

    run.jobs = lambda: given.read_text().count("#END\n") if given.exists() else 0
    return run


@pytest.mark.parametrize(("array", "message"), [
    ("train.global_batch_size=4,3", "--array: train.global_batch_size=3: train.global_batch_size: 3 does not divide by 2"),
    ("data.source={text},missing.txt", "--array: data.source=missing.txt: data.source=missing.txt: there is no such file"),
    ("data.source={text},https://example.org/a?token=PlantedToken1", "--array: data.source=https://example.org/a?token=***: "
     "source: https://example.org/a?token=***: an address with a token cannot be kept"),
])  # fmt: skip
def test_every_run_of_an_array_is_checked_before_it_is_submitted(array, message, submit, tiny_text, tiny_run):
    said = submit("--tasks-per-node", 2, "--array", array.format(text=tiny_text)).message()
    assert said.startswith(message)
    assert submit.jobs() == 0 and not tiny_run.parent.exists()


def test_a_script_is_not_written_with_a_token(genscale, tiny_config, tmp_path):
    words = ("slurm", "render", "--config", tiny_config, "--out", tmp_path / "job.sbatch")
    for more in (("--array", "data.source=a,https://example.org/a?token=PlantedToken1"),
                 ("--", "--data.source", "https://example.org/a?token=PlantedToken1")):
        said = genscale(*words, *more).message()
        assert "https://example.org/a?token=***: an address with a token cannot be kept" in said
    assert not (tmp_path / "job.sbatch").exists()


def test_an_array_without_a_mistake_is_submitted(submit, tiny_run):
    done = submit("--array", "train.global_batch_size=4,8")
    assert done.out.startswith(f"submitted job 12: 2 runs {tiny_run}-global_batch_size*"), done.err
    assert submit.jobs() == 1 and (tiny_run / "jobs" / "0001" / "job.sbatch").is_file()


def test_a_run_of_another_seed_that_would_go_on_is_checked_too(submit, copied, tiny_run):
    """What was trained there had another config."""
    copied.rename(tiny_run.parent / "tiny-seed1")
    said = submit("--array", "seed=0-1", "--", "--optimizer.lr", 0.5).message()
    assert said.startswith("--array: run.seed=1: run.resume: ") and "optimizer.lr (was 0.001, now 0.5)" in said
    assert submit.jobs() == 0


def test_a_job_that_cannot_be_noted_is_taken_back(submit, tool, tiny_run, tmp_path):
    """A file lies where a run of the array is to have its folder."""
    tool("scancel", f'echo "$@" > {tmp_path}/cancelled')
    tiny_run.parent.mkdir()
    (tiny_run.parent / "tiny-log_every2").write_text("")
    said = submit("--array", "train.log_every=1,2").message()
    assert said.startswith(f"run.dir: cannot write to {tiny_run}-log_every2/jobs (Not a directory), and job 12 was cancelled;")
    assert submit.jobs() == 1 and (tmp_path / "cancelled").read_text() == "12\n"


def test_what_to_type_next_can_be_typed(submit, tmp_path):
    done = submit("--", "--run.dir", tmp_path / "my runs")
    assert f"\n  genscale slurm logs '{tmp_path}/my runs/tiny'\n" in done.out, done.err


def test_a_backslash_in_the_path_is_refused(submit):
    """sbatch would replace no %j in the name of the log."""
    said = submit("--", "--run.name", "a\\b").message()
    assert said.startswith("run.dir: ") and "is not a path that a job's script can hold" in said and submit.jobs() == 0


@pytest.mark.slow
def test_what_cannot_fit_into_its_gpus_is_not_submitted(submit, tiny_run):
    """The nearest that can is named; without a kind of GPU, or with --no-plan, nothing is asked."""
    large = ("--", "--data.sequence_length", 256, "--model.positions", 256, "--model.width", 1024, "--model.heads", 16,
             "--model.layers", 96, "--train.global_batch_size", 128, "--train.precision", "bf16")
    gpus = ("--gpus-per-node", "a100:1")
    said = submit(*gpus, *large).message()
    assert said.startswith("train.micro_batch_size: 128 under parallel.strategy single cannot fit into memory: planned ")
    assert "GiB of 79" in said and "nearest that fits: --train.micro_batch_size" in said and "--no-plan" in said
    assert submit.jobs() == 0 and not tiny_run.exists()
    assert submit(*gpus, "--no-plan", *large).code == 0
    unknown = submit("--gpus-per-node", "gtx:1", "--", "--run.name", "other")
    assert unknown.code == 0 and "not planned whether it fits into the GPUs: 'gtx' is no kind of GPU" in unknown.err
    assert submit.jobs() == 2


@pytest.mark.parametrize(("kind", "profile"), [
    ("h100", "h100"), ("A100", "a100"), ("nvidia_h100_80gb_hbm3", "h100"), ("v100", "v100-32"), ("gtx", None), (None, None)])
def test_what_a_cluster_calls_a_gpu_is_known(kind, profile):
    assert profile_of(kind) == profile
