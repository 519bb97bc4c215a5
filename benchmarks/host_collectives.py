"""What the collectives of the hosts cost a step, with many light processes on one machine: plain torch over gloo, no genscale.

    python benchmarks/host_collectives.py --processes 64 --out benchmarks/results/host-collectives-cpu.json

A step is `phases` blocking sums of a number and one of three at its end (as it was), one sum of all counts and one of three,
both waited for (folded), or the first begun before the forward and waited for after it (begun ahead). The forward is a sleep:
what is left of the clock beside it is what the collectives take of a step; on hosts with a core each it will be less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import circumstances, write

import torch
import torch.distributed as dist

FORWARD = 0.2
"""Seconds of a step that the device computes."""


def summed(*numbers: int) -> Callable[[], list[int]]:
    """A sum over all processes that is on its way."""
    tensor = torch.tensor(numbers)
    work = dist.all_reduce(tensor, async_op=True)

    def wait() -> list[int]:
        work.wait()
        return tensor.tolist()

    return wait


def blocking(phases: int) -> None:
    """As it was: each phase waits for its own count."""
    for _ in range(phases):
        summed(8)()
        time.sleep(FORWARD / phases)
    summed(1, 0, 0)()


def folded(phases: int) -> None:
    """All counts at once, waited for."""
    summed(*[8] * phases)()
    for _ in range(phases):
        time.sleep(FORWARD / phases)
    summed(1, 0, 0)()


def ahead(phases: int) -> None:
    """All counts at once, waited for after the first forward."""
    counts = summed(*[8] * phases)
    for phase in range(phases):
        time.sleep(FORWARD / phases)
        if phase == 0:
            counts()
    summed(1, 0, 0)()


WAYS = {"a sum for each phase": blocking, "one sum": folded, "one sum, begun ahead": ahead}


def work(rank: int, world: int, steps: int, phases: list[int], folder: str) -> None:
    """One process; rank 0 leaves what it measured."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    rows = []
    for count in phases:
        for name, way in WAYS.items():
            seconds, cpu = [], time.process_time()
            for _ in range(steps):
                began = time.perf_counter()
                way(count)
                seconds.append(time.perf_counter() - began - FORWARD)
            rows.append({"phases": count, "way": name, "milliseconds_a_step": round(1000 * statistics.median(seconds), 2),
                         "cpu_milliseconds_a_step": round(1000 * (time.process_time() - cpu) / steps, 2)})
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--phases", default="1,2,3")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    phases = [int(count) for count in arguments.phases.split(",")]
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # torch is loaded once
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=work, args=(rank, arguments.processes, arguments.steps, phases, folder))
                   for rank in range(arguments.processes)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit("a process failed")
        rows = json.loads((Path(folder) / "rows.json").read_text())
    write(circumstances(["torch"]) | {"processes": arguments.processes, "steps": arguments.steps, "forward_seconds": FORWARD,
                                      "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
