"""Whatever becomes of what a run says, it trains on, and its files and its exit code are those of the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from genscale import printable
from genscale.cli import main
from genscale.tracking.progress import Progress

TRAIN = f"{sys.executable} -m genscale train --config"


@contextlib.contextmanager
def broken(kind: str) -> Iterator[IO[str] | None]:
    """A stream of that kind."""
    if kind == "none":
        yield None
        return
    if kind == "full disk":
        stream: IO[str] = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        stream = open(write, "w", buffering=1)  # noqa: SIM115
    if kind == "closed":
        stream.close()
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def run_with(out: Any, err: Any, *arguments: object) -> int:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        return main([str(argument) for argument in arguments])


def check_complete(run: Path, logged_steps: Any, steps: int) -> str:
    """Returns the log."""
    assert json.loads((run / "ended.json").read_text())["how"] == "complete"
    assert logged_steps(run) == list(range(1, steps + 1))
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir()
    return (run / "logs" / "rank-00000.log").read_text()


@pytest.mark.parametrize(("out", "err"), [("full disk", "pipe"), ("closed", "full disk"), ("none", "none")])
def test_a_run_outlives_its_streams(out, err, tiny_config, tiny_run, logged_steps):
    with broken(out) as stdout, broken(err) as stderr:
        assert run_with(stdout, stderr, "train", "--config", tiny_config) == 0
    log = check_complete(tiny_run, logged_steps, 6)
    assert log.count("standard error is lost") == (err != "none")
    assert log.count("standard output is lost") == (out != "none")


@pytest.mark.parametrize(("kind", "code"), [("full disk", 2), ("pipe", 0)])
def test_a_verb_that_is_there_to_print_ends_with_its_output(kind, code, trained, tmp_path):
    with broken(kind) as out, (tmp_path / "err").open("w") as err:
        assert run_with(out, err, "checkpoint", "list", trained) == code
    said = (tmp_path / "err").read_text()
    assert said.count("\n") == (code > 0) and "Traceback" not in said
    if code:
        assert said.startswith("error: standard output cannot be written: No space left on device")


def test_a_mistake_is_one_whoever_reads_of_it(tmp_path):
    with broken("pipe") as out, broken("pipe") as err:
        assert run_with(out, err, "checkpoint", "list", tmp_path / "none") == 2


def test_a_broken_pipe_elsewhere_is_no_end_of_the_output(monkeypatch):
    def fail(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("genscale.cli._verb", lambda verb: fail)
    with pytest.raises(BrokenPipeError):
        main(["train"])


def test_a_reader_that_has_stopped_does_not_hold_up_the_work(monkeypatch):
    """A pager, or Ctrl-S: the pipe fills, and lines are left out until it is read again."""
    monkeypatch.setattr(printable, "PATIENCE", 0.2)
    read, write = os.pipe()
    with open(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        printable.show_printable()
        for number in range(5000):
            print(f"line {number:05d} {'.' * 100}", file=sys.stderr)
        said = os.read(read, 2**20)
        print("and on", file=sys.stderr)
        while select.select([read], [], [], 0)[0]:
            said += os.read(read, 2**20)
    os.close(read)
    assert said.startswith(b"line 00000") and b"line 04999" not in said and said.endswith(b"and on\n")


def test_a_bar_outlives_its_terminal(monkeypatch):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(terminal, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        printable.show_printable()
        bar = Progress(100)
        bar.update(1, {"loss": 2.0})
        assert b"step 0/100" in os.read(controller, 2**16)
        os.close(controller)
        for step in range(2, 101):
            bar.update(step, {"loss": 2.0})
        bar.write("line")
        bar.close()


@pytest.mark.slow
@pytest.mark.parametrize("ends", [">&- 2>&- <&-", "2>&1 | head -n 1"])
def test_a_shell_that_takes_the_streams_away(ends, tiny_config, tiny_run, logged_steps):
    shell = f"set -o pipefail; {TRAIN} {tiny_config} {ends}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    check_complete(tiny_run, logged_steps, 6)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [
    ("-m", "genscale", "train"), ("-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"),
], ids=["alone", "torchrun"])
def test_a_terminal_that_is_gone_stops_a_run_with_a_checkpoint(launcher, tiny_config, tiny_run, logged_steps, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    process, controller = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.execv(sys.executable, [sys.executable, *launcher, "--config", str(tiny_config), "--train.steps", "100000",
                                  "--train.checkpoint_every", "0"])
    try:
        deadline = time.monotonic() + 90
        while not logged_steps(tiny_run):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.close(controller)
        code = psutil.Process(process).wait(60)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).kill()
    ended = json.loads((tiny_run / "ended.json").read_text())
    assert (ended["how"], ended["signal"], ended["exit_code"]) == ("stopped", "SIGHUP", 129)
    assert (tiny_run / "checkpoints" / f"step-{ended['step']:08d}").is_dir()
    assert code == (129 if len(launcher) == 3 else 1)  # which torchrun does not pass on
