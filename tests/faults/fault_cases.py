"""Every fault but kills, once: something happens to a real run of two processes at a step that a seed picks, and the run is
taken up again or has gone on. Each returns the seconds until a new step was trained, or what its own text says."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_campaign import check_same
from fault_runs import ROOT, SETTINGS, Life, Run, Shape, make_source, training_lines, wait_for

STEPS = 30
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
PLANTED = Path(__file__).parent / "planted"


class Bench:
    """One family under one strategy on two processes: the undisturbed run, made once, and runs to be disturbed."""

    def __init__(self, family: str, strategy: str, folder: Path) -> None:
        self.shape, self.folder, self.count = Shape(strategy, 2), folder, 0
        self.settings = {**SETTINGS[family], "train.steps": STEPS, "data.source": make_source(family, folder / "source")}
        self.truth = Run(folder / "undisturbed", self.settings)
        self.truth.run_to_end(self.shape)

    def run(self, home: Path | None = None, **settings: Any) -> Run:
        """A new run with the same settings, and some others; in a `home` of its own."""
        self.count += 1
        scratch = self.folder / f"run-{self.count}"
        return Run(home or scratch, {**self.settings, **settings}, scratch)


def wait_for_step(run: Run, life: Life, step: int) -> None:
    assert wait_for(lambda: run.step() >= step, life, 0.002), life.output()[-5000:]


def go_on(run: Run, shape: Shape, since: float, **variables: str) -> float:
    """Start the run again and let it end; the seconds until it trained a step."""
    done = run.latest().step
    before = run.metrics_version()
    life = run.start(shape, **variables)
    try:
        wait_for(lambda: run.metrics_version() != before and run.step() > done, life, 0.005)
        seconds = time.monotonic() - since
        end(life, 0)
        return seconds
    finally:
        life.kill()


def end(life: Life, code: int) -> str:
    """Wait for the end, which must be that code's, without a process left behind; what was printed."""
    life.wait_until_gone()
    output = life.output()
    assert life.process.returncode == code, f"exit code {life.process.returncode}, not {code}\n{output[-5000:]}"
    return output


@contextmanager
def living(run: Run, shape: Shape, **variables: str) -> Iterator[Life]:
    life = run.start(shape, **variables)
    try:
        yield life
    finally:
        life.kill()


def one_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output[-5000:]
    return lines[0]


def stopped_by_a_signal(bench: Bench, draw: random.Random) -> float:
    """Fault 2: SIGINT, SIGTERM or SIGUSR1 to the launcher: a checkpoint within a step, the signal's exit code."""
    run, number = bench.run(), draw.choice(list(CODES))
    with living(run, bench.shape) as life:
        wait_for_step(run, life, draw.randint(2, STEPS - 8))
        struck, step = time.monotonic(), run.step()
        os.kill(life.process.pid, number)
        output = end(life, CODES[number])
    saved = run.latest().step
    # One may have ended between our look and the signal, the next was under way.
    assert step <= saved <= step + 2, (step, saved)
    assert "Traceback" not in output, output[-5000:]
    seconds = go_on(run, bench.shape, struck)
    check_same(run, bench.truth)
    return seconds


def hung(bench: Bench, draw: random.Random) -> float:
    """Fault 3: one rank is stopped; the watchdog names it, writes all stacks and ends everything."""
    run, rank = bench.run(**{"guards.hang_minutes": 0.3}), draw.randrange(2)
    with living(run, bench.shape) as life:
        wait_for_step(run, life, draw.randint(4, STEPS - 8))
        struck = time.monotonic()
        life.ranks()[rank].send_signal(signal.SIGSTOP)
        output = end(life, 75)
    assert f"rank {rank}" in one_error(output)
    stacks = sorted(path.name for path in (run.folder / "logs").glob("stacks-*"))
    assert len(stacks) == 2 and all(path.stat().st_size for path in (run.folder / "logs").glob("stacks-*")), stacks
    seconds = go_on(run, bench.shape, struck)
    check_same(run, bench.truth)
    return seconds


def planted(fault: str, rank: int, step: int) -> dict[str, str]:
    return {"PLANTED_FAULT": fault, "PLANTED_RANK": str(rank), "PLANTED_STEP": str(step),
            "PYTHONPATH": os.pathsep.join([str(PLANTED), str(ROOT)])}


def raised(bench: Bench, draw: random.Random) -> float:
    """Fault 4: one rank raises; the others end, and its error is printed once."""
    run, rank, step = bench.run(), draw.randrange(2), draw.randint(4, STEPS - 8)
    with living(run, bench.shape, **planted("raise", rank, step)) as life:
        wait_for_step(run, life, step - 1)
        struck = time.monotonic()
        output = end(life, 1)
    assert output.count("RuntimeError: planted error") == 1 and output.count("Traceback") == 1, output[-5000:]
    assert time.monotonic() - struck < 60
    seconds = go_on(run, bench.shape, struck)
    check_same(run, bench.truth)
    return seconds


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of that size: a tmpfs, which takes the right to mount one."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, timeout=20)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, timeout=20)


def disk_full(bench: Bench, draw: random.Random) -> float:
    """Fault 5: no byte is free for some steps; training goes on, the former checkpoints stay whole, and the weights of the end
    are those of the run that had room. The seconds are those from there being room again to the next whole checkpoint."""
    with small_disk(bench.folder / f"disk-{bench.count}", "64m") as disk:
        run, ballast = bench.run(disk), disk / "ballast"
        with living(run, bench.shape) as life:
            assert wait_for(lambda: run.saved() > 0, life, 0.002), life.output()[-5000:]
            fill(ballast)
            assert wait_for(lambda: "could not be written" in life.output(), life), "it was not full before the end"
            saved = run.latest()
            assert saved is not None
            freed = time.monotonic()
            ballast.unlink()
            wait_for(lambda: run.saved() > saved.step, life, 0.002)
            seconds = time.monotonic() - freed
            output = end(life, 0)
        assert "Traceback" not in output, output[-5000:]
        assert run.latest().digest() == bench.truth.latest().digest()
        assert run.leftovers() == []
    return seconds


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"0" * 2**16)
            except OSError:
                return


def not_a_number(bench: Bench, draw: random.Random) -> float:
    """Fault 6: NaN in the gradient of one rank; all ranks leave the update out, say so once, and go on."""
    run, rank, step = bench.run(), draw.randrange(2), draw.randint(2, STEPS - 8)
    with living(run, bench.shape, **planted("nan", rank, step)) as life:
        wait_for_step(run, life, step - 1)
        struck = time.monotonic()
        wait_for_step(run, life, step + 1)
        seconds = time.monotonic() - struck
        end(life, 0)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    skipped = {line["step"]: line.get("skipped_steps", 0) for line in lines if "data_digest" in line}
    assert skipped == {n: int(n >= step) for n in range(1, STEPS + 1)}, skipped
    before = [list(training_lines(each.metrics()))[: step - 1] for each in (run, bench.truth)]
    assert before[0] == before[1]
    return seconds


def rolled_back(bench: Bench, draw: random.Random) -> float:
    """Fault 6 with the policy rollback: the run goes back to its latest checkpoint and on without the offending batch."""
    run, rank = bench.run(**{"guards.non_finite": "rollback"}), draw.randrange(2)
    step = draw.randint(5, STEPS - 8)
    with living(run, bench.shape, **planted("nan", rank, step)) as life:
        wait_for_step(run, life, step - 1)
        struck = time.monotonic()
        wait_for_step(run, life, step + 1)
        seconds = time.monotonic() - struck
        output = end(life, 0)
    assert "Traceback" not in output, output[-5000:]
    lines = list(training_lines([json.loads(line) for line in run.metrics_file.read_text().splitlines()]))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["rollbacks"] == 1
    assert lines[step - 1]["data_digest"] != list(training_lines(bench.truth.metrics()))[step - 1]["data_digest"]
    return seconds


def tracker_unreachable(bench: Bench, draw: random.Random) -> float:
    """Fault 8: W&B online, and nobody answers; the seconds are those of the start, to the first step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = bench.run(**{"tracking.wandb": "online"})
    with living(run, bench.shape, WANDB_BASE_URL=nobody, WANDB_API_KEY="0" * 40) as life:
        wait_for_step(run, life, 1)
        seconds = time.monotonic() - life.started
        output = end(life, 0)
    assert "Traceback" not in output, output[-5000:]
    assert re.search(r"`genscale sync ", output), output[-5000:]
    check_same(run, bench.truth)
    return seconds


def second_run(bench: Bench, draw: random.Random) -> float:
    """Fault 10: a second run in the folder of one that lives is refused, and the first does not notice; the seconds are those
    to the refusal."""
    run = bench.run()
    with living(run, bench.shape) as life:
        wait_for_step(run, life, draw.randint(1, STEPS // 2))
        ranks = life.ranks()
        for rank in ranks:  # a run of two seconds would be over before another has started
            rank.suspend()
        began = time.monotonic()
        with living(run, bench.shape) as second:
            message = one_error(end(second, 2))
        seconds = time.monotonic() - began
        assert str(life.process.pid) in message or any(str(rank.pid) in message for rank in ranks), message
        for rank in ranks:
            rank.resume()
        end(life, 0)
    check_same(run, bench.truth)
    return seconds


def another_time_zone(bench: Bench, draw: random.Random) -> float:
    """Fault 10: killed in Honolulu, taken up again in Kiritimati, where the clocks are a day ahead."""
    run = bench.run()
    with living(run, bench.shape, TZ="Pacific/Honolulu") as life:
        wait_for_step(run, life, draw.randint(5, STEPS - 8))
        struck = time.monotonic()
        life.kill()
        life.wait_until_gone()
    seconds = go_on(run, bench.shape, struck, TZ="Pacific/Kiritimati")
    check_same(run, bench.truth)
    return seconds


CASES: dict[str, Callable[[Bench, random.Random], float]] = {
    "2 SIGINT, SIGTERM, SIGUSR1": stopped_by_a_signal, "3 one rank hangs (SIGSTOP)": hung, "4 one rank raises": raised,
    "5 disk full while saving": disk_full, "6 NaN on one rank, skipped": not_a_number,
    "6 NaN on one rank, rolled back": rolled_back, "8 W&B unreachable": tracker_unreachable,
    "10 a second run in the folder": second_run, "10 resumed in another time zone": another_time_zone,
}  # fmt: skip
