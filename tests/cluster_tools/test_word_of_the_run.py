"""What a run says of its end, for the script of its job: no exit code comes through a launcher."""

from __future__ import annotations

import json
import signal
import time

import psutil
import pytest

from genscale.supervise.signals import START_SECONDS, UNWIND_SECONDS


@pytest.mark.parametrize(("settings", "reason"), [
    (("--train.stepz", 5), "--train.stepz: unknown setting"),
    (("--train.global_batch_size", 4, "--train.micro_batch_size", 3), "train.micro_batch_size: 3 x 1 processes does not"),
    (("--data.source", "nowhere.txt"), "data.source=nowhere.txt: there is no such file"),
])  # fmt: skip
def test_a_mistake_is_told_wherever_it_is_found(settings, reason, genscale, tiny_config, tiny_run, monkeypatch):
    monkeypatch.setenv("GENSCALE_RUN", str(tiny_run))
    tiny_run.mkdir(parents=True)  # by the job
    assert genscale("train", "--config", tiny_config, *settings).message().startswith(reason)
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"]) == ("failed", 2) and ended["reason"].startswith(reason)


def test_what_another_process_has_said_stands(genscale, tiny_config, run, say_ended, monkeypatch):
    monkeypatch.setenv("GENSCALE_RUN", str(run))
    run.mkdir(parents=True)
    say_ended("stopped", 138, 4)
    assert genscale("train", "--config", tiny_config, "--train.stepz", 5).code == 2
    assert json.loads((run / "ended.json").read_text())["how"] == "stopped"


def test_without_a_job_no_folder_is_made_for_a_mistake(genscale, tiny_config, tiny_run):
    assert genscale("train", "--config", tiny_config, "--train.stepz", 5).code == 2
    assert not tiny_run.exists()


@pytest.mark.slow
def test_a_launcher_in_a_job_is_not_told_of_a_signal(genscale_start, genscale_finish, tiny_config, tiny_run, logged_steps):
    """It would take the code for a failure, end whoever still writes, and fill the job's log with tracebacks."""
    words = ("train", "--processes", 2, "--config", tiny_config, "--train.steps", 100_000)
    process = genscale_start(*words, GENSCALE_RUN=str(tiny_run))
    deadline = time.monotonic() + 90
    while len(logged_steps(tiny_run)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = [child for child in psutil.Process(process.pid).children() if "--train.steps" in child.cmdline()]
    assert len(workers) == 2
    for worker in workers:  # as if they wrote a large checkpoint
        worker.suspend()
    process.send_signal(signal.SIGUSR1)
    time.sleep(START_SECONDS + UNWIND_SECONDS + 1)
    assert process.poll() is None, "it does not wait for its processes"
    for worker in workers:
        worker.resume()
    stopped = genscale_finish(process, 60)
    assert stopped.code == 0 and "stopped by SIGUSR1 after step" in stopped.out and "Traceback" not in stopped.err
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"]) == ("stopped", 138)
    assert (tiny_run / "checkpoints" / f"step-{ended['step']:08d}").is_dir()
