"""Every fault but kills, once: something happens to a real run of two processes at a step that a seed picks, and the run is
taken up again or has gone on. Each returns the seconds until a new step was trained, or what its own text says."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import datetime

import disk_cases
import tracker_cases
import update_cases
from fault_bench import STEPS, Bench, Case, end, go_on, living, one_error, planted, wait_for_step
from fault_campaign import check_same

from genscale.checkpoint.checkpoints import list_checkpoints

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


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


def two_saves_in_a_second(bench: Bench, draw: random.Random) -> float:
    """Fault 10: checkpoints of several steps fall into one second; all are whole, and the run is the same. The seconds are
    those of the time that they bear, over their number."""
    run = bench.run(**{"train.checkpoint_every": 1, "train.checkpoint_keep": STEPS})
    run.run_to_end(bench.shape, launcher=False)
    run.latest()  # looks at every byte of all
    saved = list_checkpoints(run.checkpoints)
    assert [checkpoint.step for checkpoint in saved] == list(range(1, STEPS + 1))
    times = [datetime.fromisoformat(checkpoint.manifest()["about"]["time"]) for checkpoint in saved]
    assert times == sorted(times) and len(set(times)) < len(times), times
    assert run.metrics() == bench.truth.metrics() and run.leftovers() == []
    for checkpoint in list_checkpoints(bench.truth.checkpoints):
        assert saved[checkpoint.step - 1].digest() == checkpoint.digest()
    return (times[-1] - times[0]).total_seconds() / STEPS


CASES: dict[str, Case] = {
    "2 SIGINT, SIGTERM, SIGUSR1": stopped_by_a_signal, "3 one rank hangs (SIGSTOP)": hung, "4 one rank raises": raised,
    **disk_cases.CASES, **update_cases.CASES, **tracker_cases.CASES, "10 two saves in a second": two_saves_in_a_second,
    "10 a second run in the folder": second_run, "10 resumed in another time zone": another_time_zone,
}  # fmt: skip
