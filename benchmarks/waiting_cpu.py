"""How idle OpenMP threads should wait: our step under several spin counts, on a quiet machine and beside busy loops.

    python benchmarks/waiting_cpu.py --out benchmarks/results/waiting-cpu.json        # on a quiet machine: five minutes
    python benchmarks/waiting_cpu.py --cases gpt --shapes 1x2 --spins 100,250,1000    # other spin counts than ours

Every contestant is a process (or a group of them) of its own, for libgomp reads how it is to wait when torch is loaded; all are
started once and then take turns of some steps each, so that whatever else the machine does falls on all. genscale is imported
first, as the command line does, and a contestant that says nothing waits as `genscale train` lets it. "again" is the first
contestant once more: what differs between the two is noise. A hog is a busy loop in Python.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from turns import hogs

HERE = Path(__file__).resolve().parent
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
CONTESTANTS: dict[str, dict[str, str]] = {
    "product": {}, "again": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "torch": {"GOMP_SPINCOUNT": "300000"}}
GPT = ["--model.family=gpt", "--model.layers=4", "--model.heads=4", "--model.width=128", "--model.positions=64",
       "--data.sequence_length=64", "--train.global_batch_size=12", "--train.precision=fp32"]
CASES = ("gpt", "dcgan", "vae")
"""nanoGPT's setting for a CPU, and the two families' digits.yaml."""
SHAPES = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}
"""Processes x threads of each."""
WARMUP_STEPS = 10


class Contestant:
    """Processes that make steps when told to.

    Args:
        waiting: environment variables.
    """

    def __init__(self, case: str, processes: int, threads: int, waiting: dict[str, str], port: int) -> None:
        clean = {name: value for name, value in os.environ.items() if name not in WAITING}
        clean |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent), "TOKENIZERS_PARALLELISM": "false", **waiting}
        self.workers = []
        for rank in range(processes):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true",
                     "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.workers.append(subprocess.Popen(
                [sys.executable, __file__, "--worker", case], env=clean | (group if processes > 1 else {}),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def ready(self) -> None:
        for worker in self.workers:
            if worker.stdout.readline().strip() != "ready":
                raise SystemExit("a contestant did not start")

    def steps(self, count: int) -> tuple[list[float], float]:
        """Seconds of each of so many steps, and processor seconds a step of all processes."""
        for worker in self.workers:
            worker.stdin.write(f"{count}\n")
            worker.stdin.flush()
        found = [json.loads(worker.stdout.readline()) for worker in self.workers]
        return found[0]["seconds"], sum(each["cpu"] for each in found) / count

    def close(self) -> None:
        for worker in self.workers:
            worker.stdin.close()
        for worker in self.workers:
            worker.wait()


def work(case: str) -> None:
    """What a contestant's process does: so many steps for each number that comes in."""
    out, sys.stdout = sys.stdout, sys.stderr
    importlib.import_module("genscale")  # first, as in the product
    from genscale.objectives import FAMILIES
    from genscale.settings.parser import parse_config
    from our_step import OurSteps

    config = parse_config(FAMILIES, GPT if case == "gpt" else ["--config", str(HERE.parent / "configs" / case / "digits.yaml")],
                          description="")
    steps = OurSteps(config)
    for _ in range(WARMUP_STEPS):
        steps()
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        cpu = time.process_time()
        seconds = [steps().seconds for _ in range(int(line))]
        print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu}), file=out, flush=True)
    steps.close()


def measure(case: str, shape: str, contestants: dict[str, dict[str, str]], busy: list[int], rounds: int,
            turn_seconds: float) -> dict[str, Any]:
    processes, threads = SHAPES[shape]
    running = {name: Contestant(case, processes, threads, waiting, 29500 + index)
               for index, (name, waiting) in enumerate(contestants.items())}
    for contestant in running.values():
        contestant.ready()
    result: dict[str, Any] = {}
    for count in busy:
        seconds: dict[str, list[float]] = {name: [] for name in running}
        means: dict[str, list[float]] = {name: [] for name in running}
        cpu: dict[str, list[float]] = {name: [] for name in running}
        counts = dict.fromkeys(running, 4)
        with hogs(count):
            time.sleep(0.5 if count else 0)
            for turn in range(rounds):
                order = list(running)
                for name in order[turn % len(order):] + order[:turn % len(order)]:
                    some, spent = running[name].steps(counts[name])
                    seconds[name] += some
                    means[name].append(sum(some) / len(some))
                    counts[name] = min(max(round(turn_seconds / means[name][-1]), 2), 50)
                    cpu[name].append(spent)
        result[f"hogs {count}"] = {name: {
            "least_ms": 1e3 * min(seconds[name]), "quartiles_ms": [1e3 * q for q in statistics.quantiles(seconds[name], n=4)],
            "mean_ms": 1e3 * statistics.mean(seconds[name]), "median_turn_ms": 1e3 * statistics.median(means[name]),
            "cpu_ms": 1e3 * statistics.median(cpu[name])} for name in running}
        for name, each in result[f"hogs {count}"].items():
            print(f"{case} {shape} hogs {count} {name:>10}: least {each['least_ms']:7.2f} quartiles "
                  + " ".join(f"{q:7.2f}" for q in each["quartiles_ms"])
                  + f" mean {each['mean_ms']:7.2f} turn {each['median_turn_ms']:7.2f} cpu {each['cpu_ms']:7.2f}", flush=True)
    for contestant in running.values():
        contestant.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--shapes", default="1x2,2x1", help=f"processes x threads, of {', '.join(SHAPES)}")
    parser.add_argument("--hogs", default="0,1,2")
    parser.add_argument("--spins", default="", help="spin counts to try besides, as in 1000,10000")
    parser.add_argument("--without", default="", help="contestants to leave out")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turn", type=float, default=0.3, help="seconds")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    contestants = CONTESTANTS | {f"spin {count}": {"GOMP_SPINCOUNT": count} for count in arguments.spins.split(",") if count}
    contestants = {name: waiting for name, waiting in contestants.items() if name not in arguments.without.split(",")}
    # In the workers genscale must come before torch, which this imports.
    from report import circumstances, write

    result = circumstances(["torch"]) | {"load_before": os.getloadavg(), "cases": {}}
    for case in arguments.cases.split(","):
        for shape in arguments.shapes.split(","):
            result["cases"][f"{case} {shape}"] = measure(case, shape, contestants, [int(n) for n in arguments.hogs.split(",")],
                                                         arguments.rounds, arguments.turn)
    result["load_after"] = os.getloadavg()
    write(result, arguments.out)


if __name__ == "__main__":
    main()
