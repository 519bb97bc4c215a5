"""`srun -n 2 genscale train` is one run of two processes, not two runs that fight for a folder."""

from __future__ import annotations

import json
import os

import pytest


@pytest.mark.slow
def test_tasks_of_srun_are_one_run(tool, tiny_config, tiny_run, genscale_start, genscale_finish, logged_steps):
    tool("scontrol", "echo localhost")
    step = {"SLURM_JOB_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_NODEID": "0", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
    tasks = [genscale_start("train", "--config", tiny_config, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
             for rank in (0, 1)]
    first, second = (genscale_finish(task) for task in tasks)
    assert first.code == second.code == 0, first.err + second.err
    assert "2 processes" in first.err and "srun -n 2 genscale train" in first.out and not second.out
    assert logged_steps(tiny_run) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tiny_run / "ended.json").read_text())["how"] == "complete"


def test_processes_beside_those_of_a_launcher_are_refused(genscale, tiny_config, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = genscale("train", "--config", tiny_config, "--processes", "2").message()
    assert message.startswith("--processes: 2 has no effect beside a launcher (or srun) that has started 2 processes")
