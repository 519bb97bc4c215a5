"""What goes wrong around a run: folders, disks, losses that are no numbers, mistakes that several processes find at once."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.training import run

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml")
MATRIX = [pytest.mark.slow, pytest.mark.matrix]


def holds(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message, message


# --- the run folder and the disk --------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written(refuse, tmp_path, small_disk):
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "runs"
    holds(refuse("--run.dir", below_a_file), "run.dir", below_a_file, "Not a directory", "--run.dir")
    read_only = small_disk("1m,ro")
    holds(refuse("--run.dir", read_only), "run.dir", read_only / "tiny", "Read-only file system", "--run.dir")


def test_a_disk_too_small_or_full_at_the_start(refuse, small_disk):
    small = small_disk("1m")
    holds(refuse("--run.dir", small), "run.dir", "disk full", small, "MiB free", "train.checkpoint_keep (3)", "--run.dir")
    full = small_disk("64k")
    fill(full)
    holds(refuse("--run.dir", full), "run.dir", full, "--run.dir")


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    return filler


def test_a_disk_that_is_full_when_the_run_describes_itself(genscale, small_disk, tiny_config, monkeypatch):
    disk, written = small_disk("5m"), run.config_yaml
    monkeypatch.setattr(run, "config_yaml", lambda config: written(config) if fill(disk) else "")
    holds(genscale("train", "--config", tiny_config, "--run.dir", disk).message_of_run(), "run.dir", disk / "tiny", "No space",
          "--run.dir")


@pytest.mark.parametrize("freed", [True, False])
def test_a_disk_that_fills_up_in_the_middle_of_a_run(freed, genscale, small_disk, tiny_config, logged_steps):
    """The periodic checkpoint that fails is a warning; the last one that fails is an error that names the last good one."""
    disk = small_disk("5m")
    run = disk / "tiny"
    first, second = (run / "checkpoints" / f"step-00000{step}" for step in (100, 200))

    def fill_up() -> None:
        wait_for(first.exists)
        filler = fill(disk)
        if freed:
            wait_for(lambda: "step-00000200 could not be written" in (run / "logs" / "rank-00000.log").read_text())
            filler.unlink()

    # The log must have room for the warning when the disk is full: its last page is not.
    thread = threading.Thread(target=fill_up, daemon=True)
    thread.start()
    arguments = ["--run.dir", disk, "--train.steps", 300, "--train.checkpoint_every", 100, "--train.log_every", 50]
    done = genscale("train", "--config", tiny_config, *arguments)
    thread.join(timeout=10)
    assert "Traceback" not in done.err, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning") and "checkpoint" in line]
    assert len(warnings) == 1, done.err
    holds(warnings[0], second, "could not be written", "No space left", "training goes on", first)
    assert not list((run / "checkpoints").glob(".partial*"))
    assert Checkpoint(first).problem() is None
    if freed:
        assert done.code == 0, done.err
        assert Checkpoint(run / "checkpoints" / "step-00000300").problem() is None
    else:
        assert done.code == 2
        last = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(last) == 1
        holds(last[0], "step-00000300", "could not be written", "last good checkpoint", first)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- a loss that is not a number --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "left_out"), [("stop", 0), ("skip", 5)])
def test_a_learning_rate_that_blows_up(policy, left_out, genscale, tiny_config, tiny_run, logged_steps):
    """The first update makes the weights infinite: no checkpoint is written of them, and nothing helps."""
    arguments = ["--optimizer.lr", 1e38, "--train.checkpoint_every", 1, "--train.steps", 20, "--guards.non_finite", policy]
    done = genscale("train", "--config", tiny_config, *arguments)
    message = done.message_of_run()
    step = int(re.search(r"at step (\d+)", message).group(1))
    assert logged_steps(tiny_run) == list(range(1, step)) and step == 2 + left_out
    why = "last good checkpoint: none" if policy == "stop" else "no checkpoint to go back to yet (train.checkpoint_every is 1)"
    holds(message, "loss", "nan", "rank 0", why, "optimizer.lr")
    assert done.err.count("is left out") == left_out and not list((tiny_run / "checkpoints").iterdir())


def test_going_back_takes_checkpoints(refuse):
    message = refuse("--guards.spikes", "rollback", "--train.checkpoint_every", 0, "--train.checkpoint_minutes", 0)
    holds(message, "guards.spikes: rollback", "train.checkpoint_every", "guards.spikes to skip")


def test_patience_with_a_server_is_shorter_than_the_watchdog_s(refuse):
    address = ["--data.source", "http://127.0.0.1:9/text.jsonl"]
    holds(refuse(*address, "--guards.hang_minutes", 5), "data.retry_minutes: 5 ", "guards.hang_minutes 5,",
          "set data.retry_minutes to 2.5, or guards.hang_minutes to 10")
    for allowed in (0, 6):
        assert "Connection refused" in refuse(*address, "--guards.hang_minutes", allowed)


# The loss of one sample of one step is not a number, as if its data were damaged: only one rank sees it.
PLANTED = """
import sys
from genscale.cli import start
from genscale.families.gpt.objective import LanguageModel
loss = LanguageModel.loss
def planted(self, networks, batch, draws):
    terms = loss(self, networks, batch, draws)
    return {"loss": terms["loss"] * (float("nan") if 11 in batch["sample"].tolist() else 1.0)}
LanguageModel.loss = planted
start(["train", *sys.argv[1:]])
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow),
                                      pytest.param("zero2", marks=MATRIX)])  # fmt: skip
def test_a_loss_that_is_no_number_on_one_rank_only(strategy, genscale_process, tiny_config, tiny_run, tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = genscale_process(script, "--config", tiny_config, "--parallel.strategy", strategy, "--guards.non_finite", "stop",
                            command=ACCELERATE)
    # Sample 11 is the last of the third batch of 4, so the second of two ranks has it.
    message = done.one_error()
    holds(message, "loss", "nan", "at step 3 on rank 1", "last good checkpoint", tiny_run / "checkpoints" / "step-00000002")


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    pytest.param(["--parallel.strategy", "single"], ["parallel.strategy", "single", "one process", "ddp"],
                 marks=pytest.mark.slow),
    pytest.param(["--data.source", "nowhere.txt"], ["data.source=nowhere.txt", "no such file"], marks=MATRIX),
    pytest.param(["--train.global_batch_size", 4096], ["train.global_batch_size=4096", "less than one global batch"],
                 marks=pytest.mark.slow),
    pytest.param(["--model.heads", 3], ["model.heads", "3"], marks=MATRIX),
    pytest.param(["--run.resume", "nowhere"], ["run.resume", "nowhere"], marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_say_it_once_and_end(arguments, words, genscale_process, tiny_config, tiny_run, logged_steps):
    done = genscale_process("train", "--processes", 2, "--config", tiny_config, *arguments, timeout=60)
    assert done.code == 2
    assert "Traceback" not in done.err
    holds(done.one_error(), *words)
    assert logged_steps(tiny_run) == []


SLOW_TO_SPEAK = """
import sys, time
from genscale.cli import start
from genscale.supervise.ending import Ending
claim = Ending.claim
def planted(self, *arguments):
    ours = claim(self, *arguments)
    time.sleep(3 * ours)
    return ours
Ending.claim = planted
start(["train", *sys.argv[1:]])
"""


def test_the_launchers_signal_takes_no_process_the_word(genscale_process, tiny_config, tiny_run, logged_steps, tmp_path):
    """It ends all processes as soon as one has failed, which may be one that leaves the word to another."""
    script = tmp_path / "planted.py"
    script.write_text(SLOW_TO_SPEAK)
    done = genscale_process(script, "--config", tiny_config, "--train.global_batch_size", 4096, command=ACCELERATE, timeout=60)
    holds(done.one_error(), "train.global_batch_size=4096", "less than one global batch")
    assert logged_steps(tiny_run) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.stpes", 3], ["--train.stpes", "'train.steps'"]),
    pytest.param(["--data.column", "txet"], ["data.column=txet", "'text'"], marks=MATRIX),
    pytest.param(["--run.dir", "/dev/null/runs"], ["run.dir", "/dev/null/runs", "Not a directory"], marks=pytest.mark.slow),
])  # fmt: skip
def test_accelerate_launch_says_it_once_and_ends(arguments, words, genscale_process, tiny_config, tiny_run, logged_steps):
    done = genscale_process("train.py", "--config", tiny_config, *arguments, command=ACCELERATE, timeout=60)
    holds(done.one_error(), *words)
    assert logged_steps(tiny_run) == []
