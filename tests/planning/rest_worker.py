"""What a process of a real group holds between steps under each strategy, for test_trace.py."""

from __future__ import annotations

from typing import Any

import torch

from genscale.families import FAMILIES
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.settings.parser import parse_config
from genscale.testing.workers import serve
from genscale.training.setup import averaged_networks, prepare
from genscale.training.trainer import Trainer


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> list[int]:
    """Bytes at rest of every process, after a first step."""
    config = parse_config(FAMILIES, variant["flags"])
    objective = FAMILIES["gpt"].blueprint(config).objective
    engine = build_engine(plan, processes, config.parallel, plan.precision, config.train.clip, 1, 1)
    averaged = averaged_networks(config.train.ema_half_life, "gpt", objective)
    prepare(engine, objective, config.optimizer, averaged, None, None)
    trainer = Trainer(config, objective, engine, loader=None, hooks=[], last_good=lambda: "none")
    tokens = torch.ones(1, config.data.sequence_length + 1, dtype=torch.int64)
    trainer.run_phase(objective.phases[0], 1, [{"tokens": tokens, "sample": torch.tensor([processes.rank])}]).read()
    return processes.gather(engine.bytes_at_rest())


if __name__ == "__main__":
    serve(answer)
