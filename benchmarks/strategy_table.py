"""One run under every strategy: equal losses, step time, memory, resume, precision, by real runs of `genscale train`.

    python benchmarks/strategy_table.py --only a,b,c,d --out benchmarks/results/strategies-cpu.json

a: loss against one process, step time, memory.   b: accumulation and loader workers.
c: straight against interrupted and resumed.      d: bf16 and fp16 against fp32.
e: four processes: fsdp2 over all and in groups of two, beside ddp.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genscale.testing.runs import Run, flags
from report import ROOT, circumstances, write

import psutil

DISTRIBUTED = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
PROCESSES = 2
PACKAGES = ("torch", "accelerate", "deepspeed")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
COMMON = {"data.source": "python-docs", "data.tokenizer": "bytes", "data.validation_blocks": 4, "train.log_every": 1,
          "train.clip": 1.0, "train.precision": "fp32", "schedule.warmup_steps": 10, "tracking.wandb": "disabled",
          "run.seed": 1337}
MEDIUM = {**COMMON, "model.layers": 4, "model.heads": 4, "model.width": 256, "model.positions": 128,
          "data.sequence_length": 128, "train.global_batch_size": 16}
SMALL = {**COMMON, "model.layers": 2, "model.heads": 2, "model.width": 64, "model.positions": 64, "data.sequence_length": 64,
         "train.global_batch_size": 16}
SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "optimizer.weight_decay": 0.0}
ADAMW = {"optimizer.name": "adamw", "optimizer.lr": 1e-3}


@dataclass
class Outcome:
    """A finished run: its lines of metrics.jsonl by step, and the largest VmHWM among its training processes."""

    folder: Path
    steps: dict[int, dict[str, Any]]
    peak_mib: float

    def difference(self, other: Outcome) -> float:
        """Largest relative difference of the loss over all steps."""
        assert self.steps.keys() == other.steps.keys(), "the runs logged different steps"
        pairs = [(line["loss"], other.steps[step]["loss"]) for step, line in self.steps.items()]
        return max(abs(mine - theirs) / abs(theirs) for mine, theirs in pairs)

    def same_data(self, other: Outcome) -> bool:
        return all(line["data_digest"] == other.steps[step]["data_digest"] for step, line in self.steps.items())

    def median_step_seconds(self) -> float:
        return statistics.median([line["step_seconds"] for line in self.steps.values()][-40:])


class Runner:
    """Starts runs one after the other in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.count = 0

    def train(self, strategy: str, settings: dict[str, Any], folder: Path | None = None, processes: int = PROCESSES) -> Outcome:
        """One run to its end; in an existing run `folder` it resumes."""
        self.count += 1
        folder = folder or self.scratch / f"{self.count:03d}-{strategy}"
        settings = {**settings, "parallel.strategy": strategy, "run.dir": folder.parent, "run.name": folder.name}
        command = [sys.executable, "-m", "genscale", "train"]
        command += ["--processes", str(processes)] if strategy != "single" else []
        command += flags(settings)
        started = time.perf_counter()
        with (self.scratch / "output.txt").open("w+") as output:
            process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            peak = _watch_memory(process, limit_seconds=600)
            if process.returncode:
                output.seek(0)
                raise SystemExit(f"failed with {process.returncode}: {' '.join(command)}\n{output.read()[-3000:]}")
        print(f"  {folder.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return Outcome(folder, {line["step"]: line for line in Run(folder).metrics() if "loss" in line}, peak)


def _watch_memory(process: subprocess.Popen, limit_seconds: float) -> float:
    """Wait for a run. Returns the largest VmHWM in MiB of any training process (those with a RANK, or the only one)."""
    peaks: dict[int, float] = {}
    deadline = time.monotonic() + limit_seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.terminate()
            raise SystemExit(f"a run took more than {limit_seconds} s")
        for pid, peak in _peaks(process.pid):
            peaks[pid] = peak
        time.sleep(0.2)
    # The launcher imports torch too, but trains nothing: it counts only where there was no other process.
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return max(workers or peaks.values())


def _peaks(pid: int) -> Iterator[tuple[int, float]]:
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return
    for member in family:
        try:
            if member.pid == pid or "RANK" in member.environ():
                status = Path(f"/proc/{member.pid}/status").read_text()
                yield member.pid, next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        except (psutil.Error, OSError, StopIteration):  # ended meanwhile
            continue


# --- the tables ----------------------------------------------------------------------------------------------------------


def table_a(runner: Runner, steps: int) -> list[dict[str, Any]]:
    """Every strategy against one process, and beside it what reordering the sums alone does: one process, accumulation 2.

    Which order comes out far from which is chance where AdamW magnifies rounding: so the largest over accumulation 2, 4, 8 too.
    """
    medium = {**MEDIUM, "train.steps": steps}
    single = {"sgd": runner.train("single", {**medium, **SGD}), "adamw": runner.train("single", {**medium, **ADAMW})}

    def reordered(name: str, optimizer: dict[str, Any], accumulation: int) -> float:
        micro = {"train.micro_batch_size": MEDIUM["train.global_batch_size"] // accumulation}
        return runner.train("single", {**medium, **optimizer, **micro}).difference(single[name])

    sgd_noise, adamw_noise = reordered("sgd", SGD, 2), [reordered("adamw", ADAMW, n) for n in (2, 4, 8)]
    rows = []
    for strategy in ("single", *DISTRIBUTED):
        sgd = single["sgd"] if strategy == "single" else runner.train(strategy, {**medium, **SGD})
        adamw = single["adamw"] if strategy == "single" else runner.train(strategy, {**medium, **ADAMW})
        same_data = sgd.same_data(single["sgd"]) and adamw.same_data(single["adamw"])
        rows.append({"strategy": strategy, "processes": 1 if strategy == "single" else PROCESSES,
                     "sgd_difference": sgd.difference(single["sgd"]), "sgd_noise": sgd_noise,
                     "adamw_difference": adamw.difference(single["adamw"]), "adamw_noise": adamw_noise[0],
                     "adamw_noise_2_4_8": max(adamw_noise), "same_data": same_data,
                     "step_seconds": adamw.median_step_seconds(), "peak_rss_mib": adamw.peak_mib,
                     "bytes_at_rest_mib": _at_rest(strategy)["bytes"] / 2**20})
    ddp = next(row for row in rows if row["strategy"] == "ddp")["step_seconds"]
    for row in rows:
        row["time_to_ddp"] = row["step_seconds"] / ddp
    return rows


def table_b(runner: Runner, steps: int) -> list[dict[str, Any]]:
    settings = {**SMALL, **SGD, "train.steps": steps}
    single = runner.train("single", settings)
    rows = []
    for strategy in ("ddp", "zero2", "fsdp2"):
        for accumulation, workers in ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2), (4, 2)):
            micro = SMALL["train.global_batch_size"] // PROCESSES // accumulation
            run = runner.train(strategy, {**settings, "train.micro_batch_size": micro, "data.workers": workers})
            rows.append({"strategy": strategy, "accumulation": accumulation, "workers": workers,
                         "sgd_difference": run.difference(single), "same_data": run.same_data(single)})
    return rows


def table_c(runner: Runner) -> list[dict[str, Any]]:
    """40 steps straight, against the same run cut off after its checkpoint of step 20 and taken up again."""
    rows = []
    settings = {**SMALL, **ADAMW, "train.steps": 40, "train.checkpoint_every": 20}
    for strategy in ("single", *DISTRIBUTED):
        straight = runner.train(strategy, settings)
        copy = straight.folder.with_name(f"{straight.folder.name}-resumed")
        shutil.copytree(straight.folder, copy)
        shutil.rmtree(copy / "checkpoints" / "step-00000040")
        resumed = runner.train(strategy, settings, folder=copy)
        digests = [_digest(run.folder / "checkpoints" / "step-00000040") for run in (straight, resumed)]
        assert all(resumed.steps[step] == straight.steps[step] for step in range(1, 21)), "began anew instead of resuming"
        same = sum(resumed.steps[step]["loss"] == straight.steps[step]["loss"] for step in range(21, 41))
        rows.append({"strategy": strategy, "same_digest": digests[0] == digests[1], "same_losses": f"{same} of 20",
                     "digest": digests[0][:16]})
    return rows


def table_d(runner: Runner, steps: int) -> list[dict[str, Any]]:
    settings = {**SMALL, **ADAMW, "train.steps": steps}
    fp32 = runner.train("single", settings)
    runs = [("bf16", strategy) for strategy in ("single", *DISTRIBUTED)] + [("fp16", "single"), ("fp16", "ddp")]
    return [{"precision": precision, "strategy": strategy,
             "difference_to_fp32": runner.train(strategy, {**settings, "train.precision": precision}).difference(fp32)}
            for precision, strategy in runs]


def table_e(runner: Runner, steps: int) -> list[dict[str, Any]]:
    """Four processes, with fewer cores perhaps: seconds of all their cores a step stand beside those of the clock."""
    settings = {**MEDIUM, **SGD, "train.steps": steps}
    single = runner.train("single", settings)
    noise = runner.train("single", {**settings, "train.micro_batch_size": MEDIUM["train.global_batch_size"] // 2})
    rows = []
    for shape, strategy, shard_size in (("fsdp2 in groups of 2", "fsdp2", 2), ("fsdp2", "fsdp2", None), ("ddp", "ddp", None),
                                        ("zero3 in groups of 2", "zero3", 2), ("zero3", "zero3", None)):
        own = {"parallel.shard_size": shard_size} if shard_size else {}
        run, held = runner.train(strategy, {**settings, **own}, processes=4), _at_rest(strategy, 4, shard_size)
        rows.append({"shape": shape, "processes": 4, "sgd_difference": run.difference(single),
                     "sgd_noise": noise.difference(single), "same_data": run.same_data(single),
                     "step_seconds": run.median_step_seconds(), "cpu_seconds_a_step": held["cpu_seconds"],
                     "bytes_at_rest_mib": held["bytes"] / 2**20})
    return rows


def _digest(checkpoint: Path) -> str:
    command = [sys.executable, "-m", "genscale", "checkpoint", "digest", str(checkpoint)]
    return _output(command).strip()


def _output(command: list[str]) -> str:
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


# --- bytes at rest: weights and optimizer state that a process holds, which peak RSS hides --------------------------------


def _at_rest(strategy: str, processes: int = PROCESSES, shard_size: int | None = None) -> dict[str, float]:
    """Of the model of table a under AdamW: the bytes on the process that holds most, and the seconds that all processes compute
    for a step of one sequence each (start-up, data and logging left out)."""
    output = _output([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node",
                      "1" if strategy == "single" else str(processes), "--standalone", __file__,
                      "--at-rest", json.dumps([strategy, shard_size])])
    found = [[float(word) for word in line.split()[1:]] for line in output.splitlines() if line.startswith("at_rest")]
    return {"bytes": max(held for held, _ in found), "cpu_seconds": sum(seconds for _, seconds in found)}


def at_rest_worker(strategy: str, shard_size: int | None) -> None:
    """One process of `_at_rest`."""
    from genscale.families.gpt.network import GPT, GPTSettings
    from genscale.parallel.processes import Processes
    from genscale.parallel.strategies import ParallelPlan, build_engine
    from genscale.settings.config import OptimizerSettings, ParallelSettings
    from genscale.training.optimizers import make_optimizer

    import torch

    processes = Processes(need_group=True)
    shape = {key.removeprefix("model."): value for key, value in MEDIUM.items() if key.startswith("model.")}
    network = GPT(GPTSettings(**shape), vocab_size=320)
    network.initialise(1337)
    plan = ParallelPlan(strategy, "none", "fp32", processes.world_size, shard_size)
    settings = ParallelSettings(strategy=strategy, shard_size=shard_size)
    engine = build_engine(plan, processes, settings, "fp32", 1.0, 1, 1)
    engine.prepare({"gpt": network}, lambda module: make_optimizer(module, OptimizerSettings()))
    tokens, seconds = torch.zeros(1, MEDIUM["data.sequence_length"], dtype=torch.long), []
    for _ in range(8):
        began = time.process_time()
        with engine.micro_batch("gpt", last=True):
            engine.backward("gpt", engine.networks["gpt"](tokens).float().square().mean())
        engine.step("gpt")
        seconds.append(time.process_time() - began)
    # One write, newline included: the processes share the pipe.
    sys.stdout.write(f"\nat_rest {engine.bytes_at_rest()} {statistics.median(seconds[2:])}\n")
    sys.stdout.flush()
    processes.close()


# --- the report ----------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if isinstance(value, float):
            return f"{value:.1e}" if 0 < value < 1e-2 else f"{value:.4g}"
        return str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(map(cell, row.values())) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of a run in tables a, b, d and e")
    parser.add_argument("--only", default="a,b,c,d,e", help="which tables, as in a,c")
    parser.add_argument("--out", type=Path, help="JSON file to write; tables not run now are kept from what it held")
    parser.add_argument("--at-rest", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.at_rest:
        from genscale.parallel.exit_together import run_and_leave

        run_and_leave(lambda: at_rest_worker(*arguments.at_rest))
    about = circumstances(PACKAGES) | {"steps": arguments.steps}
    before = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {"tables": {}}
    kept = {name: {"steps": before["steps"], **table} for name, table in before["tables"].items()}
    result: dict[str, Any] = {**about, "peak_memory": "VmHWM of /proc/<pid>/status, largest training process",
                              "config": {"a, e": MEDIUM, "b, c, d": SMALL, "sgd": SGD, "adamw": ADAMW}, "tables": kept}
    with tempfile.TemporaryDirectory(prefix="genscale-strategies-") as scratch:
        runner = Runner(Path(scratch))
        tables = {"a": lambda: table_a(runner, arguments.steps), "b": lambda: table_b(runner, arguments.steps),
                  "c": lambda: table_c(runner), "d": lambda: table_d(runner, arguments.steps),
                  "e": lambda: table_e(runner, arguments.steps)}
        for name in arguments.only.split(","):
            rows = tables[name]()
            result["tables"][name] = {"date": about["date"], "commit": about["commit"], "steps": arguments.steps,
                                      "load_before": about["load_before"], "rows": rows}
            print(f"\n({name})\n{markdown(rows)}", flush=True)
            if arguments.out:
                write(result, arguments.out)


if __name__ == "__main__":
    main()
