"""One process of test_padding.py, started by torchrun: what pads DeepSpeed's partitions out becomes NaN, then a weight does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.settings.config import OptimizerSettings, ParallelSettings
from genscale.training.optimizers import make_optimizer


def verdicts(strategy: str, processes: Processes, plan: object) -> dict[str, bool]:
    engine = build_engine(plan, processes, ParallelSettings(strategy=strategy), "fp32", 0.0, 1, 1)
    networks = {"net": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))}  # 26 weights, and none divides by the processes
    engine.prepare(networks, lambda module: make_optimizer(module, OptimizerSettings()), None, ("net",))
    for flats in (engine.flat_partitions("net"), engine.averages["net"].averages):
        pieces = engine.cut("net", flats)
        kept = [piece.values.clone() for piece in pieces]
        for flat in flats:
            flat.detach().fill_(float("nan"))
        for piece, values in zip(pieces, kept, strict=True):
            piece.values.copy_(values)
    found = {"padding": engine.weights_are_finite()}
    if processes.rank == 1:
        engine.cut("net", engine.flat_partitions("net"))[-2].values[:1] = float("nan")
    return {**found, "weight": engine.weights_are_finite()}


def main(out: Path) -> None:
    torch.manual_seed(0)
    plans = {name: plan_parallel(ParallelSettings(strategy=name), "fp32", "adamw") for name in ("zero2", "zero3")}
    clear_launch_environment()
    processes = Processes(need_group=True)
    results = {name: verdicts(name, processes, plan) for name, plan in plans.items()}
    if processes.is_main:
        out.write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    run_and_leave(lambda: main(Path(sys.argv[1])))
