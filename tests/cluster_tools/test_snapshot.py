"""The code that a job was submitted with: whatever becomes of the checkout, its lives run that, and say which it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from genscale.checkpoint.code_version import ROOT, code_in, commit_of, in_words, snapshot_of
from genscale.cluster import snapshot
from genscale.cluster.lives import read_lives

# In the place of the training: it says where its code comes from, here and where the data's workers get theirs.
TRAINING = """
import multiprocessing, sys
from genscale.checkpoint import code_version

def main(arguments, stop):
    if __file__ != sys.modules["genscale"].__file__.replace("__init__.py", "verbs/train.py"):
        return 3
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["genscale.marker"])
    worker = context.Process(target=__import__("genscale.marker").marker.say)
    worker.start()
    worker.join()
    print("trained by", "MARK", code_version.commit(), code_version.snapshot(), flush=True)
    return 1
"""


def mark(clone, word):
    (clone / "genscale" / "marker.py").write_text(f"def say():\n    print('worker of {word}', flush=True)\n")
    (clone / "genscale" / "verbs" / "train.py").write_text(TRAINING.replace("MARK", word))


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout") / "clone"
    shutil.copytree(ROOT / "genscale", folder / "genscale", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "launch", folder / "launch")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


@pytest.fixture
def clone(checkout, tmp_path, monkeypatch):
    """A checkout with changes, from which jobs are submitted."""
    folder = tmp_path / "clone"
    shutil.copytree(checkout, folder)
    mark(folder, "old")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(snapshot, "ROOT", folder)
    return folder


@pytest.fixture
def slurm(genscale, tool, clone, tiny_config, tmp_path):
    """`genscale slurm` there, and `slurm.life(run, restart)`: what a life of its job prints."""
    for name, script in {"sbatch": f'echo "$*" >> {tmp_path}/given; echo $((11 + $(wc -l < {tmp_path}/given)))',
                         "squeue": "exit 0", "sinfo": "exit 1", "sacct": "exit 1",
                         "scontrol": '[ "$2" != hostnames ] || echo node0',
                         "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
                         # Accelerate's launcher starts a process as torchrun does.
                         "python": 'if [ "$2" = accelerate.commands.launch ]; then [ -f "$4" ] || exit 9; '
                                   'until [[ $1 == *.py || $1 == --module ]]; do shift; done; '
                                   '[ "$1" != --module ] || set -- -m "${@:2}"; set -- -u "$@"; fi; '
                                   f'exec {sys.executable} "$@"'}.items():
        tool(name, script)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({"gpus_per_node": 0, "cpus_per_process": 1, "setup": []}))

    def run(action, *words):
        if action == "submit":
            words = ("--config", tiny_config, "--site", site, *words)
        return genscale("slurm", action, *words)

    def life(folder, restart):
        slurms = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1",
                  "SLURMD_NODENAME": "node0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                  **({"SLURM_RESTART_COUNT": str(restart)} if restart else {}), "PYTHONPATH": str(clone)}
        done = subprocess.run(["bash", folder / "jobs" / "0001" / "job.sbatch"], env={**os.environ, **slurms}, text=True,
                              capture_output=True, timeout=60)
        return done.stdout + done.stderr

    run.life = life
    return run


def test_every_life_runs_the_code_that_the_job_was_submitted_with(slurm, clone):
    run = Path("runs/tiny")  # as seen from where a job starts
    done = slurm("submit", "--", "--run.dir", "runs")
    (code,) = (run / "jobs").glob("code-*")
    said = f"commit {git(clone, 'rev-parse', 'HEAD')[:9]}+changes, snapshot {code.name.removeprefix('code-')}"
    assert f"code: {said}\n" in done.out, done.err
    expected = f"trained by old {git(clone, 'rev-parse', 'HEAD').strip()}-dirty {code.name.removeprefix('code-')}\n"
    life = slurm.life(run, 0)
    assert expected in life and "worker of old\n" in life and "the job is requeued" in life, life
    mark(clone, "new")
    shutil.rmtree("launch")
    git(clone, "commit", "--quiet", "--all", "--message", "a pull")
    life = slurm.life(run, 1)
    assert expected in life and "worker of old\n" in life and "worker of new" not in life, life
    assert [in_words(life.commit, life.snapshot) for life in read_lives(run)] == 2 * [said]
    began = [line for line in (run / "jobs" / "events.log").read_text().splitlines() if "begins" in line]
    assert len(began) == 2 and all(line.endswith(f"begins on node0 after step 0: {said}") for line in began)
    heading, row = slurm("status", run).out.splitlines()
    assert row[heading.index("CODE"):heading.index("NOTE")].strip() == said


def test_a_job_that_is_submitted_again_has_the_fix(slurm, clone, tiny_run):
    slurm("submit", "--launcher", "srun")
    (old,) = tiny_run.glob("jobs/code-*")
    assert f"code: {code_in(old)}\n" in slurm("resubmit", tiny_run).out
    mark(clone, "new")
    again = slurm("resubmit", tiny_run)
    (new,) = {*tiny_run.glob("jobs/code-*")} - {old}
    shutil.rmtree("genscale")
    assert f"code: {code_in(new)}\n" in again.out and "trained by new" in slurm.life(tiny_run, 0)


def test_without_a_copy_a_life_runs_what_it_finds(slurm, clone, tiny_run):
    slurm("submit", "--launcher", "srun", "--no-snapshot")
    mark(clone, "new")
    commit = git(clone, "rev-parse", "HEAD").strip()
    assert f"trained by new {commit}-dirty None\n" in slurm.life(tiny_run, 0)
    assert [life.commit for life in read_lives(tiny_run)] == [f"{commit}-dirty"]
    assert slurm("resubmit", tiny_run).code == 0 and not list(tiny_run.glob("jobs/code-*"))


def test_runs_of_an_array_share_one_copy(slurm, tiny_run):
    assert slurm("submit", "--launcher", "srun", "--array", "seed=0-2").code == 0
    (code,) = tiny_run.parent.rglob("code-*")
    assert code.parent == tiny_run / "jobs" and slurm("submit", "--launcher", "srun", "--dry-run").out.count(code.name) == 1


@pytest.mark.parametrize("kind", ["apptainer", "pyxis"])
def test_a_container_sees_the_copy(kind, slurm, tiny_run, tmp_path):
    site = tmp_path / "container.yaml"
    site.write_text(f"{{gpus_per_node: 0, container: /i.sif, container_kind: {kind}}}")
    script = slurm("submit", "--site", site, "--dry-run").out
    assert "-m genscale" not in script and "--module genscale" not in script
    assert f"export GENSCALE_CODE={tiny_run}/jobs/code-" in script
    inside = 'apptainer exec --nv --bind "$PWD" /i.sif ' if kind == "apptainer" else ""
    for program in ('python "$GENSCALE_CODE" slurm begin', 'python "$GENSCALE_CODE" slurm end',
                    'python -m accelerate.commands.launch --config_file "$GENSCALE_CODE/launch/ddp.yaml"'):
        assert f"{inside}{program} " in script, script
    assert (f"{tiny_run.parent}:{tiny_run.parent}" in script) == (kind == "pyxis")


def test_a_job_that_slurm_refuses_leaves_no_copy(slurm, tool, tiny_run):
    tool("sbatch", "echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    assert slurm("submit", "--launcher", "srun").code == 2 and not tiny_run.exists()


def test_a_copy_has_what_is_code_and_is_made_once(clone, run, tmp_path):
    for name in ("__pycache__/a.pyc", ".git/config", ".ruff_cache/x", "models/.swp", "old.pyc"):
        (clone / "genscale" / name).parent.mkdir(exist_ok=True)
        (clone / "genscale" / name).write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "own.py").write_text("x = 1\n")
    (clone / "genscale" / "linked").symlink_to(tmp_path / "elsewhere")
    taken = snapshot.take(run, with_launch_file=True)
    place = taken.keep()
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    tracked = git(clone, "ls-files", "genscale").split()
    new = {"genscale/marker.py", "genscale/linked/own.py"}
    assert files == {*tracked, *new, "launch/ddp.yaml", "__main__.py", "commit"}
    assert not any(path.is_symlink() for path in place.rglob("*")) and [*place.parent.iterdir()] == [place]
    number = place.stat().st_ino
    (place / "genscale" / "__pycache__").mkdir()  # which the job leaves
    assert snapshot.take(run, True).keep() == place and place.stat().st_ino == number
    assert snapshot.take(run, False).digest != taken.digest
    (place / "genscale" / "rng.py").unlink()  # a disk that is swept: the job that uses it may have read it
    second = taken.keep()
    assert second.name == f"{place.name}-2" == f"code-{snapshot_of(second)}" and taken.keep() == second


def test_code_that_cannot_be_kept_is_said_before_anything_is_written(slurm, clone, tiny_run, tmp_path):
    assert "has a colon, and Python" in slurm("submit", "--", "--run.dir", tmp_path / "a:b").message()
    with (clone / "genscale" / "weights.bin").open("wb") as file:
        file.truncate(40 * 2**20)
    said = slurm("submit").err.splitlines()[-1]  # below a warning of a slow disk perhaps
    assert said.startswith(f"error: --no-snapshot: {clone}/genscale has more than 32 MiB") and "weights.bin" in said
    assert not tiny_run.exists() and slurm("submit", "--no-snapshot").code == 0


def test_the_commit_of_code_with_new_files(clone, run):
    git(clone, "checkout", "--quiet", ".")
    commit = git(clone, "rev-parse", "HEAD").strip()
    assert commit_of(clone) == f"{commit}-dirty"  # marker.py
    place = snapshot.take(run, False).keep()
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "--message", "second")
    second = git(clone, "rev-parse", "HEAD").strip()
    assert (commit_of(clone), commit_of(place), snapshot_of(clone)) == (second, f"{commit}-dirty", None)
    assert snapshot.take(run, False).keep() == place and commit_of(place) == second  # which has the same code
    shutil.rmtree(".git")
    assert commit_of(clone) is None and in_words(None, None) == ""


def test_a_life_of_before_has_no_code(genscale, run, tool):
    for name in ("squeue", "scontrol", "sacct"):
        tool(name, "exit 0")
    (run / "jobs").mkdir(parents=True)
    life = {"job": "7", "restart": 0, "nodes": ["n0"], "began": "2025-01-01T00:00:00+00:00", "step": 0}
    (run / "jobs" / "lives.json").write_text(json.dumps({"lives": [life]}))
    heading, row = genscale("slurm", "status", run).out.splitlines()
    assert row[heading.index("CODE"):heading.index("NOTE")].strip() == "-"
