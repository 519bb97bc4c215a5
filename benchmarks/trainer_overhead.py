"""What the trainer costs: one step of ours against a bare PyTorch loop over the same model and data, taking turns.

    python benchmarks/trainer_overhead.py --out benchmarks/results/trainer-overhead-cpu.json

Ours is the real thing: StepLoader (reading, packing, the ledger), LanguageModel, ReplicatedEngine, Trainer.train_step. The bare
loop has its batches ready and does nothing but forward, backward, clip, step. Both start from the same weights and see the same
batches, so their losses must agree: that is checked. The two alternate step by step in one process, so that whatever else the
machine does falls on both. Wall time is what counts; the step's CPU time is shown beside because a busy machine leaves it alone
(of the training thread: exact with --threads 1, without the loader's thread, which works beside it).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from strategy_table import machine
from torch import Tensor, nn

from genscale.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.data.loader import StepLoader
from genscale.data.text import TextData, TextDataSettings
from genscale.models.gpt import GPTSettings
from genscale.objectives import FAMILIES
from genscale.parallel.materialise import fill, materialise
from genscale.parallel.processes import Processes
from genscale.parallel.replicated import ReplicatedEngine
from genscale.training.optimizers import make_optimizer
from genscale.training.signals import StopSignal
from genscale.training.trainer import Trainer

SIZES = {"tiny": {"layers": 2, "heads": 2, "width": 64, "time": 64, "batch": 4, "steps": 400},
         "small": {"layers": 6, "heads": 6, "width": 384, "time": 256, "batch": 4, "steps": 30}}
WARMUP_STEPS = 5
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
Step = Callable[[], float]  # returns the loss


def config_of(size: dict[str, int]) -> Config:
    model = GPTSettings(layers=size["layers"], heads=size["heads"], width=size["width"], positions=size["time"])
    return Config(model=model, data=TextDataSettings(sequence_length=size["time"]),
                  train=TrainSettings(steps=10**6, global_batch_size=size["batch"]),
                  optimizer=OptimizerSettings(lr=1e-4), schedule=ScheduleSettings(name="constant"))


def loader_of(data: TextData, config: Config) -> StepLoader:
    batch = config.train.global_batch_size
    return StepLoader(data, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1, workers=0, prefetch_steps=2)


def our_step(config: Config, data: TextData, objective: Any) -> tuple[Step, Callable[[], None]]:
    """A call for one step of the trainer, and one to end its loader."""
    engine = ReplicatedEngine(Processes(), config.parallel, "fp32", config.train.clip, config.train.global_batch_size, 1)
    engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer),
                   {name: objective.initial_weights(name) for name in objective.networks})
    loader = loader_of(data, config)
    trainer = Trainer(config, objective, engine, loader, hooks=[], last_good=lambda: "none")
    stop, steps = StopSignal(), iter(range(1, config.train.steps))
    return lambda: trainer.train_step(next(steps), stop).metrics["loss"], loader.close


def bare_step(config: Config, network: nn.Module, batches: list[Tensor]) -> Step:
    """A call for one step of the loop that a person would write for this model alone."""
    optimizer = make_optimizer(network, config.optimizer)
    network.train()
    ready = iter(batches)

    def step() -> float:
        tokens = next(ready)
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(size: dict[str, int]) -> dict[str, Any]:
    config = config_of(size)
    data = TextData(config.data, config.run.seed)
    objective = FAMILIES["gpt"].build_objective(config, data)
    twin = copy.deepcopy(objective.networks["gpt"])
    materialise(twin, torch.device("cpu"))
    fill(twin, objective.initial_weights("gpt"))
    count = WARMUP_STEPS + size["steps"]
    loader = loader_of(data, config)
    batches = [loader.next_batch()[0]["tokens"] for _ in range(count)]
    loader.close()
    ours, close = our_step(config, data, objective)
    contestants = {"genscale": ours, "bare": bare_step(config, twin, batches)}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contestants} for clock in CLOCKS}
    losses: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(count):
        # The order changes too: the second of a pair finds warmer caches.
        for name in sorted(contestants, reverse=turn % 2 == 0):
            started = {clock: read() for clock, read in CLOCKS.items()}
            losses[name].append(contestants[name]())
            for clock, read in CLOCKS.items():
                seconds[clock][name].append(read() - started[clock])
    close()
    difference = max(abs(a - b) / b for a, b in zip(losses["genscale"][:WARMUP_STEPS], losses["bare"], strict=False))
    if difference > 1e-5:
        raise SystemExit(f"the two loops do not train alike: their losses differ by {difference:.1e}")
    return {**size, "parameters": sum(p.numel() for p in twin.parameters()),
            "largest_relative_difference_of_losses": difference,
            **{clock: summary({name: values[WARMUP_STEPS:] for name, values in by_name.items()})
               for clock, by_name in seconds.items()}}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = sorted(a / b for a, b in zip(seconds["genscale"], seconds["bare"], strict=True))
    return {"ratio_of_medians": round(medians["genscale"] / medians["bare"], 4),
            "ratio_quartiles": [round(pairs[len(pairs) * quarter // 4], 4) for quarter in (1, 3)],
            **{f"{name}_milliseconds": round(1e3 * value, 3) for name, value in medians.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"which of {', '.join(SIZES)}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for name in arguments.sizes.split(","):
        results[name] = measure(SIZES[name])
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if arguments.out:
        about = {"date": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "machine": machine(), "threads": arguments.threads,
                 "versions": {"python": platform.python_version(), "torch": version("torch")},
                 "command": " ".join(["python", "benchmarks/trainer_overhead.py", *sys.argv[1:]])}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
