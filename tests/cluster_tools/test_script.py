"""The scripts of jobs: those in slurm/, and what bash makes of any."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genscale.supervise.supervision import group_timeout_minutes

ROOT = Path(__file__).resolve().parents[2]
DEMO = ("--config", "configs/gpt/demo.yaml")
SHIPPED = {"single-node": (), "multi-node": ("--nodes", "2"), "array": ("--array", "seed=0-2")}


@pytest.fixture
def render(genscale, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    site = tmp_path / "site.yaml"
    site.write_text("")

    def run(*arguments, site_text=""):
        site.write_text(site_text)
        done = genscale("slurm", "render", "--site", site, *arguments)
        assert done.code == 0, done.err
        return done.out

    return run


@pytest.mark.parametrize("name", SHIPPED)
def test_the_scripts_to_copy_are_what_render_writes(name, render):
    assert (ROOT / "slurm" / f"{name}.sbatch").read_text() == render(*DEMO, *SHIPPED[name])


def test_there_are_no_others():
    assert {path.stem for path in (ROOT / "slurm").iterdir()} == set(SHIPPED)


CONTAINER = """
container: /images/gen scale.sif
environment: {A: "b 'c' $d"}
scratch: /scratch/my $HOME
network_interface: ib0
"""


@pytest.mark.parametrize(("arguments", "site"), [
    ((), ""), (("--launcher", "srun"), ""), (("--gpus-per-node", 0, "--tasks-per-node", 3), ""),
    (("--array", "optimizer.lr=1e-3,3e-4"), ""), ((), CONTAINER), (("--launcher", "srun"), CONTAINER),
    (("--", "--data.source", "it's a \"file\" $x.txt", "--run.resume", "never"), "modules: [a/1, b]"),
])  # fmt: skip
def test_bash_understands_every_variant(arguments, site, render):
    script = render(*DEMO, *arguments, site_text=site)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and not done.stderr, done.stderr


def tell(render, tmp_path, *arguments, site_text="setup: []", **variables):
    """Run the script with programs in the place of Slurm's and of Python that only say what they were called with."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "squeue").write_text('#!/bin/bash\n[[ $* == *--jobs=12345* ]] && echo "$ENDS"\n')
    (folder / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && printf "node3\\nnode4\\n"\n')
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do echo "srun $1"; shift; done\nexec "$@"\n')
    for name in ("python", "apptainer"):
        (folder / name).write_text('#!/bin/bash\nprintf "%s\\n" "call $(basename "$0")" "${@/#/  }"\n'
                                   'env | grep -E -e "^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|OMP_|GENSCALE_|A=)" '
                                   '-e "^(HF_|NCCL_SOCK|TORCH_NCCL_H)"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me", "SLURM_JOB_ID": "12345",
                   "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "16",
                   "SLURM_GPUS_ON_NODE": "4", "SLURM_NODEID": "1", "SLURM_PROCID": "5", "SLURM_NTASKS": "8",
                   "SLURM_LOCALID": "1", **variables}
    for name in ("demo", "other", "demo-lr3e-4"):
        (tmp_path / "runs" / name / "jobs").mkdir(parents=True, exist_ok=True)  # as `slurm begin` leaves it
        (tmp_path / "runs" / name / "jobs" / "port").write_text("20345\n")
    script = tmp_path / "job.sbatch"
    script.write_text(render(*DEMO, "--nodes", 2, *arguments, site_text=site_text))
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_accelerate_is_told_its_machine_and_where_to_meet(render, tmp_path):
    done = tell(render, tmp_path, "--", "--data.source", "it's a file $x.txt", "--run.name", "other")
    words = done.stdout.splitlines()
    launch = words[words.index("  accelerate.commands.launch"):]
    for flag, value in (("num_machines", "2"), ("machine_rank", "1"), ("num_processes", "8"), ("main_process_ip", "node3"),
                        ("main_process_port", str(20000 + 345)), ("num_cpu_threads_per_process", "4")):
        assert launch[launch.index(f"  --{flag}") + 1] == f"  {value}", launch
    assert "  it's a file $x.txt" in launch and launch[launch.index("  --run.dir") + 1] == "  runs"
    assert launch[len(launch) - 1 - launch[::-1].index("  --run.name") + 1] == "  other"
    assert "OMP_NUM_THREADS=4" in words and done.returncode == 0


def test_without_a_launcher_each_process_knows_its_rank(render, tmp_path):
    done = tell(render, tmp_path, "--launcher", "srun")
    words = done.stdout.splitlines()
    train = words[words.index("  train"):]
    for line in ("RANK=5", "WORLD_SIZE=8", "LOCAL_RANK=1", "MASTER_ADDR=node3", "MASTER_PORT=20345", "OMP_NUM_THREADS=16"):
        assert line in train, train
    assert "srun --ntasks=8" in words and "srun --ntasks-per-node=4" in words


@pytest.mark.parametrize(("ends", "stop"), [
    ("2030-01-01T00:05:00", ["GENSCALE_STOP_AT=1893456000"]), ("N/A", []), ("", []),  # no limit; no answer
])  # fmt: skip
def test_the_training_knows_when_to_stop(ends, stop, render, tmp_path):
    words = tell(render, tmp_path, "--launcher", "srun", ENDS=ends, TZ="UTC").stdout.splitlines()
    assert sorted({word for word in words[words.index("  train"):] if word.startswith("GENSCALE_STOP_AT")}) == stop


def test_an_element_of_an_array_has_its_own_value_and_folder(render, tmp_path):
    done = tell(render, tmp_path, "--array", "optimizer.lr=1e-3,3e-4", SLURM_ARRAY_JOB_ID="12340", SLURM_ARRAY_TASK_ID="1")
    assert "  --optimizer.lr=3e-4" in done.stdout and "  demo-lr3e-4" in done.stdout
    assert "  runs/demo-lr3e-4" in done.stdout


@pytest.mark.parametrize(("arguments", "minutes", "workers"), [
    (("--", "--guards.hang_minutes", 50, "--data.workers", 3), 50, 3),
    (("--array", "data.workers=1,5,2", "--", "--guards.hang_minutes", 40), 40, 5),
    (("--array", "guards.hang_minutes=30,70"), 70, 0),
])  # fmt: skip
def test_a_life_is_prepared_for_the_run_that_needs_most(arguments, minutes, workers, render, tmp_path):
    words = tell(render, tmp_path, *arguments, SLURM_ARRAY_TASK_ID="0").stdout.splitlines()
    begin = words[words.index("  begin"):]
    assert begin[begin.index("  --workers") + 1] == f"  {workers}"
    seconds = next(line for line in words if line.startswith("TORCH_NCCL_HEARTBEAT")).partition("=")[2]
    assert int(seconds) == 60 * group_timeout_minutes(minutes)


def test_a_later_life_goes_on_where_the_first_was_to_start_anew(render, tmp_path):
    first = tell(render, tmp_path, "--", "--run.resume", "never").stdout.splitlines()
    assert first[first.index("  --run.resume") + 1] == "  never" and first.count("  --run.resume") == 1
    shutil.rmtree(tmp_path / "programs")
    later = tell(render, tmp_path, "--", "--run.resume", "never", SLURM_RESTART_COUNT="1").stdout.splitlines()
    assert later[len(later) - later[::-1].index("  --run.resume")] == "  auto"


def test_everything_of_python_runs_in_the_container(render, tmp_path):
    done = tell(render, tmp_path, site_text=CONTAINER)
    lines = done.stdout.splitlines()
    assert lines.count("call apptainer") == 3 and "call python" not in lines and "call accelerate" not in lines
    assert lines.count("  /images/gen scale.sif") == 3 and f"  {tmp_path}" in lines  # --bind $PWD
    assert "A=b 'c' $d" in lines and "NCCL_SOCKET_IFNAME=ib0" in lines
    assert f"HF_HOME=/scratch/my {os.environ['HOME']}/huggingface" in lines


@pytest.mark.parametrize(("own", "scratch"), [(True, True), (True, False), (False, True)])
def test_who_has_logged_in_to_the_hub_is_logged_in_in_the_job(own, scratch, render, tmp_path):
    """Though HF_HOME, where the token lies, is another folder there. As the Hub's own library finds it."""
    places = {"own": (tmp_path / "home" / ".cache", own), "scratch": (tmp_path / "disk", scratch)}
    for name, (above, has) in places.items():
        folder = above / "huggingface"
        folder.mkdir(parents=True)
        if has:
            (folder / "token").write_text(f"hf_{name}")
    lines = tell(render, tmp_path, site_text=f"setup: []\nscratch: {tmp_path}/disk", HOME=str(tmp_path / "home")).stdout
    variables = dict(line.split("=", 1) for line in lines.splitlines() if line.startswith("HF_"))
    assert variables["HF_HOME"] == f"{tmp_path}/disk/huggingface"
    found = subprocess.run([sys.executable, "-c", "import huggingface_hub; print(huggingface_hub.get_token())"], text=True,
                           env={"HOME": str(tmp_path / "home"), "PATH": os.environ["PATH"], **variables}, capture_output=True,
                           timeout=60, check=True)
    assert found.stdout.strip() == ("hf_scratch" if scratch else "hf_own")


def test_no_node_names_are_an_error_and_not_this_machine(render, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text(render(*DEMO, site_text="setup: []"))
    environment = {"PATH": "/nowhere", "SLURM_JOB_NODELIST": "node[0-1]"}
    done = subprocess.run([shutil.which("bash"), str(script)], env=environment, capture_output=True, text=True, timeout=20,
                          cwd=tmp_path)
    assert done.returncode == 1 and "names no node of 'node[0-1]'" in done.stderr


def test_render_writes_a_file_where_it_is_told_to(render, tmp_path):
    assert render(*DEMO, "--out", tmp_path / "job.sbatch") == f"{tmp_path}/job.sbatch\n"
    assert (tmp_path / "job.sbatch").read_text() == render(*DEMO)
