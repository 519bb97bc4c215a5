"""A process that hangs or fails takes the run down at once: with one line that says where, and no process left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

MATRIX = [pytest.mark.slow, pytest.mark.matrix]
# Rank 1 meets its fate in the loss of step 3, or where its fate says.
PLANTED = """
import os, signal, sys, time
from genscale.errors import UserError
from genscale.families.gpt.objective import LanguageModel
from genscale.parallel.launcher import run_workers
from genscale.cli import start

def endless():
    while True:
        pass

def bug():
    raise RuntimeError("a bug of ours")

def busy():
    from genscale.supervise.watchdog import Watchdog
    if "ASLEEP_IN" in os.environ:  # within a look of the watchdog, and at once
        method = os.environ.pop("ASLEEP_IN")
        look = getattr(Watchdog, method)
        def asleep(watchdog, *arguments):
            look(watchdog, *arguments)
            setattr(Watchdog, method, look)
            os.kill(os.getpid(), signal.SIGSTOP)
        setattr(Watchdog, method, asleep)
    print("busy", file=sys.stderr, flush=True)
    for _ in range(25):  # a clock that stands still while the process does, and is right on a machine that has much to do
        time.sleep(0.1)

def mistake():
    raise UserError("data.source: a mistake that only one process sees")

FATES = {"endless": endless, "sleep": lambda: time.sleep(10000), "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
         "bug": bug, "busy": busy, "mistake": mistake, "killed": lambda: os.kill(os.getpid(), signal.SIGKILL)}

def fated(function, where):
    def call(*arguments, **options):
        result = function(*arguments, **options)
        if where(*arguments):
            FATES[fate]()
        return result
    return call

fate, place, processes, *arguments = sys.argv[1:]
if "RANK" not in os.environ:
    sys.exit(run_workers(int(processes), sys.argv))
if os.environ["RANK"] == os.environ.get("FATED", "1"):
    if place == "loss":
        LanguageModel.loss = fated(LanguageModel.loss, lambda objective, networks, batch, draws: draws.step == 3)
    elif place == "evaluation":
        LanguageModel.evaluate = fated(LanguageModel.evaluate, lambda *_: True)
    elif place == "start":
        from genscale.training import run
        run.build_engine = fated(run.build_engine, lambda *_: True)
    elif place == "data":
        from genscale.data.loader import StepLoader
        StepLoader.next_batch = fated(StepLoader.next_batch, lambda loader: loader.state()["batches"] == 3)
start(["train", *arguments])
"""


@pytest.fixture
def fate(tmp_path, tiny_config, genscale_process) -> Callable:
    """`fate("endless", "loss", "zero2")`: the tiny run on two processes, one of which comes to that; its Outcome."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)

    def run(what: str, place: str, strategy: str = "ddp", *arguments: object, processes: int = 2, **variables: str):
        settings = ["--config", tiny_config, "--parallel.strategy", strategy, "--train.checkpoint_every", 2, *arguments]
        return genscale_process(script, what, place, processes, *settings, command=(sys.executable,), timeout=150, **variables)

    return run


@pytest.mark.parametrize(("what", "strategy", "words"), [
    ("stopped", "ddp", ["does not answer (stopped"]),
    pytest.param("endless", "fsdp2", ["hangs", "(endless)"], marks=pytest.mark.slow),
    pytest.param("sleep", "zero2", ["hangs", "planted.py"], marks=MATRIX),
    pytest.param("stopped", "zero2", ["does not answer (stopped"], marks=MATRIX),
    pytest.param("sleep", "ddp", ["hangs", "planted.py"], marks=MATRIX),
])  # fmt: skip
def test_a_process_that_hangs_is_named_and_the_run_ends(what, strategy, words, fate, tiny_run):
    done = fate(what, "loss", strategy, "--guards.hang_minutes", 0.05)
    assert done.code == 75, done.err
    line = done.one_error()
    assert "no progress for 3 seconds" in line and "rank 1 (process " in line and "step 3" in line, line
    assert all(word in line for word in words), line
    stacks = [(tiny_run / "logs" / f"stacks-rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "planted.py" in stacks[1] and all("most recent call first" in text for text in stacks)
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"]) == ("hang", 75) and ended["step"] >= 2
    assert ended["reason"] in line


@pytest.mark.slow
@pytest.mark.matrix
def test_rank_0_stopped(fate, tiny_run):
    done = fate("stopped", "data", "ddp", "--guards.hang_minutes", 0.05, FATED="0")
    assert done.code == 75, done.err
    assert "rank 0 (process " in done.one_error()


@pytest.mark.parametrize(("what", "place", "strategy", "code"), [
    ("mistake", "data", "ddp", 2), pytest.param("bug", "loss", "zero2", 1, marks=pytest.mark.slow),
    pytest.param("bug", "start", "ddp", 1, marks=MATRIX),
    pytest.param("mistake", "evaluation", "fsdp2", 2, marks=MATRIX),
])  # fmt: skip
def test_the_first_error_is_shown_once_and_all_end(what, place, strategy, code, fate, tiny_run):
    done = fate(what, place, strategy)
    assert done.code == code, done.err
    text = done.out + done.err
    for noise in ("reset by peer", "closed by peer", "is gone", "ChildFailedError"):
        assert noise not in text, text
    said = "a bug of ours" if what == "bug" else "a mistake that only one process sees"
    assert text.count("Traceback") == (what == "bug"), text
    assert len(re.findall(rf"^(?:error: data.source|(?:\[rank1\]: )?RuntimeError): {said}$", text, re.MULTILINE)) == 1, text
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"], ended["rank"]) == ("failed", code, 1) and said in ended["reason"]


@pytest.mark.slow
@pytest.mark.matrix
def test_of_three_processes_the_killed_one_is_named_once(fate, tiny_run):
    done = fate("killed", "loss", "ddp", "--train.global_batch_size", 6, processes=3)
    assert done.code == 137, done.err
    assert done.err.count("was ended by SIGKILL") == 1 and "Traceback" not in done.err and "error:" not in done.err, done.err


@pytest.mark.slow
@pytest.mark.parametrize("asleep_in", [None, "_beat"])
def test_a_run_that_was_suspended_does_not_hang(asleep_in, tiny_config, tiny_run, tmp_path):
    """All of it, in the middle of a step, for longer than it may hang: by a scheduler, or a laptop's lid."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    command = [sys.executable, str(script), "busy", "loss", "1", "--config", str(tiny_config), "--guards.hang_minutes", "0.1"]
    root = Path(__file__).resolve().parents[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "FATED": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
             "PYTHONPATH": str(root), **({"ASLEEP_IN": asleep_in} if asleep_in else {})}
    run = psutil.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True, env={**os.environ, **alone})
    try:
        while "busy" not in (line := run.stderr.readline()):
            assert line, "ended too early"
        if asleep_in:
            while run.status() != psutil.STATUS_STOPPED:
                time.sleep(0.1)
        else:
            time.sleep(1.5)  # for the watchdog to have seen that nothing moves
            run.suspend()
        time.sleep(8)
        run.resume()
        _, said = run.communicate(timeout=120)
    finally:
        if run.poll() is None:
            run.kill()
    assert run.returncode == 0, said
    assert json.loads((tiny_run / "ended.json").read_text())["how"] == "complete"
