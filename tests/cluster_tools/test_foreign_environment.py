"""What the shell of someone who submits holds of other jobs, and of habits, reaches neither Slurm's commands nor the job."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

# As inside an element of an array, in its second life, of someone with habits of their own.
FOREIGN = {
    "SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "2",
    "SLURM_MEM_PER_CPU": "512", "SLURM_TIME_FORMAT": "relative", "SLURM_STEP_NUM_TASKS": "8", "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1", "SQUEUE_STATES": "COMPLETED", "SQUEUE_FORMAT": "%j", "SINFO_FORMAT": "%P",
    "SCANCEL_STATE": "PENDING", "SACCT_FORMAT": "User", "RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "1",
    "GENSCALE_STOP_AT": "7", "GENSCALE_RUN": "runs/other", "DS_ACCELERATOR": "cpu",
}  # fmt: skip
OWN = {"SLURM_CONF": "/etc/slurm/slurm.conf", "HF_TOKEN": "hf_ownownown", "GENSCALE_VENV": "/my/venv"}


@pytest.fixture
def submit(genscale, tool, tiny_config, tmp_path, monkeypatch):
    """`submit(*words)` from that shell, to programs that note what they are given."""
    note = f'(echo "{{}} $*"; env) >> {shlex.quote(str(tmp_path))}/given'
    for name, said in (("sbatch", "echo 12"), ("sinfo", "exit 1"), ("scancel", ""),
                       ("squeue", '[ -z "$SQUEUE_STATES" ] && [ -e running ] && echo "12|RUNNING|None|node0|1:00"; exit 0')):
        tool(name, f"{note.format(name)}\n{said}")
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site.yaml"
    tool("python", "exit 0")
    site.write_text("setup: []\ngpus_per_node: 0\ncpus_per_process: 1\n")
    for name, value in {**FOREIGN, **OWN}.items():
        monkeypatch.setenv(name, value)

    def run(*words):
        return genscale("slurm", words[0], "--config", tiny_config, "--site", site, "--launcher", "srun", *words[1:])

    run.given = lambda: (tmp_path / "given").read_text().splitlines()
    return run


def test_no_command_of_slurm_sees_it(submit):
    done = submit("submit", "--time", "2:00:00")
    assert done.code == 0, done.err
    given = submit.given()
    assert {"sbatch", "squeue", "sinfo"} <= {line.partition(" ")[0] for line in given}
    assert not [line for line in given if line.partition("=")[0] in FOREIGN]
    for name, value in OWN.items():  # a job has its user's environment
        assert f"{name}={value}" in given
    (line,) = [line for line in given if line.startswith("sbatch ")]
    for option in ("--export=ALL", "--time=2:00:00", "--requeue", "--open-mode=append", "--signal=USR1@300", "--nodes=1"):
        assert option in line.split()


def test_a_running_job_is_not_hidden_and_no_second_one_submitted(submit, tiny_run, monkeypatch):
    monkeypatch.delenv("RANK")  # a rank lets the first one speak of a mistake, and waits
    assert submit("submit").code == 0
    Path("running").touch()
    assert f"{tiny_run} has a job already: 12 (running)" in submit("submit").message()
    assert len([line for line in submit.given() if line.startswith("sbatch ")]) == 1


@pytest.fixture
def job(submit, tool, tmp_path):
    """`job(*flags, **variables)`: what the script of job 77 prints, and what it calls, where that shell's variables have come
    with it. Slurm has set its own; training ends for the job to be requeued."""
    tool("scontrol", 'echo "call scontrol $*" >&2; [[ $* != "show hostnames"* ]] || echo node0; '
                     '[[ $* != *"show job 7"* ]] || echo "JobId=77 Restarts=$LIVES Requeue=1"')
    tool("srun", 'echo "call srun $*"; while [[ $1 == --* ]]; do shift; done; exec "$@"')
    tool("python", 'echo "call python $*"; env; [[ $* == *"slurm end"* ]] && exit 75; exit 0')
    tool("squeue", 'echo "call squeue $*" >&2; [[ $* == *format=%e* ]] && echo "${SLURM_TIME_FORMAT:-$ENDS}"; exit 0')
    def run(*flags, **variables):
        (tmp_path / "job.sbatch").write_text(submit("render", *flags).out)
        slurms = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "1",
                  "LIVES": "0", "ENDS": "2100-01-01T00:05:00", "TZ": "UTC", **variables}
        done = subprocess.run(["bash", "job.sbatch"], env={**os.environ, **slurms}, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    return run


def test_a_job_knows_itself_by_what_slurm_gave_it(job):
    said = job("--", "--run.resume", "never")
    assert "call scontrol requeue 77\n" in said and "40_1" not in said
    assert "resume auto" not in said.replace("--run.", "")
    lines = said.splitlines()
    assert "GENSCALE_STOP_AT=4102444800" in lines and "SLURM_JOB_ID=77" in lines
    left = {line.partition("=")[0] for line in lines} & set(FOREIGN)
    assert left == {"SLURM_JOB_ID", "GENSCALE_STOP_AT", "GENSCALE_RUN", "RANK", "WORLD_SIZE", "MASTER_PORT", "DS_ACCELERATOR"}
    for line in ("RANK=3", "WORLD_SIZE=8", "MASTER_PORT=1", "GENSCALE_RUN=runs/other"):  # of the job's own are others
        assert line not in lines
    assert "--mem=0" in next(line for line in lines if line.startswith("call srun"))


def test_a_life_that_is_not_the_first_is_known_as_such(job):
    said = job("--", "--run.resume", "never", SLURM_RESTART_COUNT="1", LIVES="1")
    assert "--run.resume auto" in said and "SLURM_RESTART_COUNT=1\n" in said


def test_an_element_of_an_array_requeues_itself(job):
    said = job("--array", "seed=3-4", SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    assert "call scontrol requeue 70_3\n" in said and "resume" not in said


def test_an_end_in_the_past_is_no_reason_to_stop(job):
    said = job(ENDS="2020-01-01T00:00:00")
    assert "genscale: job 77: by squeue it ended at Wed Jan  1 00:00:00 UTC 2020, so it goes by the signal alone" in said
    assert "GENSCALE_STOP_AT" not in said
