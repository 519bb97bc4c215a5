"""Stopped or killed at any moment, a run goes on as if nothing had been: the same weights, every step logged once."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from genscale.testing.runs import Run

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml")
STEPS = 30
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def settings(tiny_settings) -> dict[str, Any]:
    """Steps long enough (some 50 ms) to be hit in the middle."""
    train = {"steps": STEPS, "global_batch_size": 32, "micro_batch_size": 2, "precision": "fp32", "log_every": 1,
             "checkpoint_every": 10}
    return {**tiny_settings, "train": train}


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory, genscale, genscale_process) -> Callable[[int], tuple[str, list[dict]]]:
    """(digest, metrics) of the run that nobody disturbs, for a number of processes."""
    done: dict[int, tuple[str, list[dict]]] = {}

    def run(processes: int) -> tuple[str, list[dict]]:
        if processes not in done:
            config = write_config(settings, tmp_path_factory.mktemp("undisturbed"))
            arguments = command_line(config, processes)
            outcome = genscale(*arguments) if processes == 1 else genscale_process(*arguments)
            assert outcome.code == 0, outcome.err
            done[processes] = (digest(genscale, config.parent / "tiny"), metrics(config.parent / "tiny"))
        return done[processes]

    return run


@pytest.fixture
def config(settings, tmp_path) -> Path:
    return write_config(settings, tmp_path)


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "config with a space.yaml"
    path.write_text(yaml.safe_dump({**settings, "run": {"name": "tiny", "dir": str(folder)}}))
    return path


def command_line(config: Path, processes: int) -> list[object]:
    return ["train", *(["--processes", processes] if processes > 1 else []), "--config", config]


def digest(genscale, run: Path) -> str:
    """Of the last checkpoint, which must be that of the last step."""
    done = genscale("checkpoint", "digest", run)
    assert done.code == 0, done.err
    assert (run / "checkpoints" / f"step-{STEPS:08d}").is_dir()
    return done.out.strip()


def metrics(run: Path) -> list[dict]:
    """What the training lines of metrics.jsonl say, but for the times."""
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens", "data_digest")
    return [{key: line[key] for key in keys} for line in Run(run).lines()]


def whole_lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(condition: Callable[[], bool], process, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.printed()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def check_stop(outcome, number: signal.Signals, logged: int, run: Path) -> str:
    """The exit code, the message, the checkpoint, no step more than the one under way; returns the command to go on with."""
    assert outcome.code == SIGNALS[number], outcome.err
    assert "Traceback" not in outcome.out + outcome.err, outcome.err
    step = int(re.search(rf"stopped by {number.name} after step (\d+)", outcome.out).group(1))
    # One may have ended between our count and the signal, the next was under way.
    assert logged <= step <= logged + 2
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    assert str(run / "checkpoints") in outcome.out
    ended = json.loads((run / "ended.json").read_text())
    assert (ended["how"], ended["signal"], ended["step"], ended["exit_code"]) == ("stopped", number.name, step, SIGNALS[number])
    assert abs((datetime.now(UTC) - datetime.fromisoformat(ended["time"])).total_seconds()) < 300
    assert [record["step"] for record in metrics(run)] == list(range(1, step + 1))
    return re.search(r"^go on with: (.*)$", outcome.out, re.MULTILINE).group(1)


def check_same(genscale, run: Path, expected: tuple[str, list[dict]]) -> None:
    assert metrics(run) == expected[1]
    assert [record["step"] for record in expected[1]] == list(range(1, STEPS + 1))
    assert digest(genscale, run) == expected[0]


SLOW, MATRIX = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.matrix]


@pytest.mark.parametrize(("processes", "number"), [
    (1, signal.SIGINT), pytest.param(1, signal.SIGTERM, marks=MATRIX), pytest.param(1, signal.SIGUSR1, marks=MATRIX),
    pytest.param(2, signal.SIGUSR1, marks=SLOW), pytest.param(2, signal.SIGTERM, marks=MATRIX),
    pytest.param(2, signal.SIGINT, marks=MATRIX), pytest.param(2, signal.SIGHUP, marks=MATRIX),
])  # fmt: skip
def test_a_signal_stops_within_a_step_and_the_run_goes_on(processes, number, genscale, genscale_start, genscale_finish,
                                                          genscale_process, config, undisturbed):  # fmt: skip
    run = config.parent / "tiny"
    process = genscale_start(*command_line(config, processes))
    wait_for(lambda: whole_lines(run) >= 8, process)
    logged = whole_lines(run)
    process.send_signal(number)
    again = check_stop(genscale_finish(process, 60), number, logged, run)
    # What is printed is typed.
    words = shlex.split(again)
    assert words[0] == "genscale"
    done = (genscale if processes == 1 else genscale_process)(*words[1:])
    assert done.code == 0, done.err
    assert "continuing from" in done.err
    check_same(genscale, run, undisturbed(processes))


@pytest.mark.slow
def test_accelerate_launch_passes_a_signal_on(genscale, genscale_start, genscale_finish, genscale_process, config, undisturbed):
    """Its launcher ends with an exit code of its own."""
    run = config.parent / "tiny"
    process = genscale_start("train.py", "--config", config, command=ACCELERATE)
    wait_for(lambda: whole_lines(run) >= 8, process)
    process.send_signal(signal.SIGTERM)
    stopped = genscale_finish(process, 60)
    assert stopped.code != 0
    assert len(re.findall(r"stopped by SIGTERM after step \d+", stopped.out)) == 1, stopped.err
    assert re.search(r"^go on with: accelerate launch train.py --config ", stopped.out, re.MULTILINE)
    done = genscale_process("train.py", "--config", config, command=ACCELERATE)
    assert done.code == 0, done.err
    check_same(genscale, run, undisturbed(2))


@pytest.mark.parametrize(("number", "moment"), [
    (signal.SIGINT, "imports"), pytest.param(signal.SIGUSR1, "imports", marks=MATRIX),
    pytest.param(signal.SIGTERM, "building", marks=SLOW),
])  # fmt: skip
def test_interrupted_before_the_first_step(number, moment, genscale_start, genscale_finish, config):
    """While libraries are loaded, and while the model is built: no traceback, and nobody waits for a step."""
    process = genscale_start("train", "--config", config)
    folder = config.parent / "tiny" / "logs"
    wait_for(lambda: psutil.Process(process.pid).num_threads() > 1 if moment == "imports" else folder.exists(), process)
    process.send_signal(number)
    stopped = genscale_finish(process, 60)
    assert stopped.code == SIGNALS[number], stopped.err
    assert stopped.err.splitlines()[-1] == f"stopped by {number.name} before the first step", stopped.err
    assert metrics(config.parent / "tiny") == []


@pytest.mark.slow
@pytest.mark.matrix
def test_a_signal_during_start_up_of_two_processes(genscale_start, genscale_finish, config):
    """At moments when one of them may wait for the other."""
    for delay in (0.5, 4.0, 8.0):
        process = genscale_start(*command_line(config, 2))
        launcher = psutil.Process(process.pid)
        wait_for(lambda launcher=launcher: len(launcher.children()) >= 2, process)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        stopped = genscale_finish(process, 60)
        assert stopped.code == 143 and "Traceback" not in stopped.err, stopped.err


# An evaluation of many short batches, and a word when it begins.
SLOW_EVALUATION = """
import sys, time
from pathlib import Path
from genscale.cli import start
from genscale.families.gpt.objective import LanguageModel
evaluate = LanguageModel.evaluate
def slow(self, networks, batch):
    Path(sys.argv[2] + ".evaluating").touch()
    time.sleep(0.7)
    return evaluate(self, networks, batch)
LanguageModel.evaluate = slow
start(["train", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(genscale, genscale_start, genscale_finish, config, undisturbed):
    script, run = config.parent / "slow.py", config.parent / "tiny"
    script.write_text(SLOW_EVALUATION)
    arguments = ["--config", config, "--data.validation_blocks", 200, "--train.evaluate_every", 10]  # 100 batches of 2: 70 s
    process = genscale_start(script, *arguments, command=(sys.executable,))
    wait_for(Path(f"{config}.evaluating").exists, process)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # the second changes nothing
    sent = time.monotonic()
    stopped = genscale_finish(process, 60)
    assert time.monotonic() - sent < 40, "it waited for the evaluation"
    assert stopped.code == 138 and "stopped by SIGUSR1 after step 10" in stopped.out, stopped.err
    assert (run / "checkpoints" / "step-00000010").is_dir()
    killed = genscale_start("train", *arguments)
    wait_for(lambda: "validation_loss" in (run / "metrics.jsonl").read_text(), killed)
    killed.kill()
    genscale_finish(killed, 60)
    done = genscale("train", *arguments)
    assert done.code == 0, done.err
    lines = Run(run).metrics()
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20, 30], "the cut one is made up, once"
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=MATRIX)])
def test_killed_outright_the_run_goes_on_from_the_last_checkpoint(processes, genscale, genscale_start, genscale_finish,
                                                                  genscale_process, config, undisturbed):  # fmt: skip
    run = config.parent / "tiny"
    arguments = command_line(config, processes)
    process = genscale_start(*arguments)
    wait_for(lambda: whole_lines(run) >= 13, process)
    process.kill()
    genscale_finish(process)
    assert len(metrics(run)) >= 13
    done = (genscale if processes == 1 else genscale_process)(*arguments)
    assert done.code == 0, done.err
    assert f"continuing from {run / 'checkpoints' / 'step-00000010'}" in done.err
    check_same(genscale, run, undisturbed(processes))


@pytest.mark.slow
@pytest.mark.matrix  # as tests/faults/test_kills.py does
def test_killed_again_and_again_while_checkpoints_are_written(genscale, genscale_start, genscale_finish, config, undisturbed):
    """A checkpoint after every step, so that kills at odd moments hit the writing, the renaming and the pruning."""
    run = config.parent / "tiny"
    arguments = ["train", "--config", config, "--train.checkpoint_every", 1, "--train.checkpoint_keep", 1]
    for kill in range(4):
        process = genscale_start(*arguments)
        wait_for(lambda goal=6 * (kill + 1): len(metrics(run)) >= goal, process)
        time.sleep(0.007 * kill)
        process.kill()
        genscale_finish(process)
        assert genscale("checkpoint", "verify", run).code == 0
    done = genscale_finish(genscale_start(*arguments))
    assert done.code == 0, done.err
    assert "damaged" not in done.err
    check_same(genscale, run, undisturbed(1))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


@pytest.mark.slow
def test_workers_whose_launcher_was_killed_save_and_end(genscale, genscale_start, genscale_process, config, undisturbed):
    run = config.parent / "tiny"
    arguments = command_line(config, 2)
    process = genscale_start(*arguments)
    wait_for(lambda: whole_lines(run) >= 8, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.process.kill()
    _, left = psutil.wait_procs(workers, timeout=30)
    for worker in left:
        worker.kill()
    process.process.wait(10)
    assert not left
    assert list((run / "checkpoints").glob("step-*"))
    done = genscale_process(*arguments)
    assert done.code == 0, done.err
    check_same(genscale, run, undisturbed(2))


@pytest.mark.slow
def test_a_rank_that_nobody_ends_says_that_the_other_is_gone(genscale_start, genscale_finish, config):
    """Two processes without a launcher, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [genscale_start(*command_line(config, 1), **place, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    wait_for(lambda: whole_lines(config.parent / "tiny") >= 13, ranks[0])
    ranks[1].kill()
    ended = genscale_finish(ranks[0], 60)
    genscale_finish(ranks[1])
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert ended.err.splitlines()[-1].startswith("error: another process of the run is gone"), ended.err
    said = json.loads((config.parent / "tiny" / "ended.json").read_text())
    assert (said["how"], said["exit_code"]) == ("lost", 2)


@pytest.mark.slow
@pytest.mark.matrix
def test_one_worker_killed_takes_the_run_down_and_says_so(genscale, genscale_start, genscale_finish, genscale_process, config,
                                                          undisturbed):  # fmt: skip
    """As the kernel does where memory runs out."""
    run = config.parent / "tiny"
    arguments = command_line(config, 2)
    process = genscale_start(*arguments)
    wait_for(lambda: whole_lines(run) >= 13, process)
    worker = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
    worker.kill()
    ended = genscale_finish(process, 60)
    assert ended.code == 128 + signal.SIGKILL, ended.err
    assert "process 1 of 2 was ended by SIGKILL (out of memory?)" in ended.err
    assert "Traceback" not in ended.err, ended.err
    done = genscale_process(*arguments)
    assert done.code == 0, done.err
    check_same(genscale, run, undisturbed(2))
