"""One training step of ours as a call, of any family, and what a comparison with another loop says."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import circumstances, write

from genscale.config import Config
from genscale.data.loader import StepLoader
from genscale.objectives import FAMILIES
from genscale.objectives.base import Objective
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.training.optimizers import make_optimizer
from genscale.training.run import averaged_networks
from genscale.training.signals import StopSignal
from genscale.training.step_report import StepReport
from genscale.training.trainer import Trainer


class OurSteps:
    """What `genscale train` does in a step: StepLoader, objective, engine with averages, Trainer.train_step; no hooks.

    Args:
        kind: of the trainer.
    """

    def __init__(self, config: Config, kind: type[Trainer] = Trainer) -> None:
        plan = plan_parallel(config.parallel, config.train.precision)
        self.precision = config.train.precision = plan.precision
        batch = config.train.global_batch_size
        micro = config.train.micro_batch_size or batch
        family = FAMILIES[config.model.family]
        self.data = family.build_data(config.data, config.run.seed)
        self.objective: Objective = family.build_objective(config, self.data)
        self.parameters = sum(p.numel() for network in self.objective.networks.values() for p in network.parameters())
        self.processes = Processes(need_group=plan.needs_group)
        engine = build_engine(plan, self.processes, config.parallel, plan.precision, config.train.clip, micro, batch // micro)
        engine.prepare(self.objective.networks, lambda module: make_optimizer(module, config.optimizer),
                       {name: self.objective.initial_weights(name) for name in self.objective.networks},
                       averaged_networks(config, self.objective))
        self.loader = StepLoader(self.data, global_batch_size=batch, micro_batch_size=micro, rank=0, world_size=1,
                                 workers=config.data.workers, prefetch_steps=config.data.prefetch_steps,
                                 pin_memory=self.processes.device.type == "cuda")
        self.trainer = kind(config, self.objective, engine, self.loader, hooks=[], last_good=lambda: "none")
        self._stop, self._step = StopSignal(), 0

    def __call__(self) -> StepReport:
        self._step += 1
        return self.trainer.train_step(self._step, self._stop)

    def close(self) -> None:
        self.loader.close()
        self.processes.close()


def compared(seconds: dict[str, list[float]], warmup: int) -> dict[str, Any]:
    """Medians of the seconds of our steps (`genscale`) and of the other's, which took turns, and their ratio."""
    kept = {name: values[warmup:] for name, values in seconds.items()}
    ours, theirs = kept["genscale"], next(values for name, values in kept.items() if name != "genscale")
    medians = {name: statistics.median(values) for name, values in kept.items()}
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median_step_seconds": medians, "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
            "quartiles_of_ratios": statistics.quantiles(ratios, n=4)}


def compare_precisions(description: str, compare: Callable[[str, int, int], dict[str, Any]], batch: int) -> None:
    """The command line of a comparison in fp32 on both sides, and of our default against fp32."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="fp32,default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = circumstances(["torch", "accelerate"]) | {"threads": arguments.threads, "comparisons": {}}
    for name in arguments.only.split(","):
        result["comparisons"][name] = compare("fp32" if name == "fp32" else "auto", arguments.batch, arguments.steps)
    write(result, arguments.out)
