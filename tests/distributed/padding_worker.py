"""What a process of test_padding.py does: what pads DeepSpeed's partitions out becomes NaN, then a weight does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.settings.config import OptimizerSettings, ParallelSettings
from genscale.testing.workers import serve
from genscale.training.optimizers import make_optimizer


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, bool]:
    torch.manual_seed(0)
    engine = build_engine(plan, processes, ParallelSettings(strategy=plan.strategy), "fp32", 0.0, 1, 1)
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


if __name__ == "__main__":
    serve(answer)
