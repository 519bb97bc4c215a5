"""What a step of a real group of processes holds at most, and what its optimizer sends, for test_counted_steps.py."""

from __future__ import annotations

import gc
from collections import defaultdict
from typing import Any

import torch

from genscale.families import FAMILIES, family
from genscale.parallel import zero
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.planning.recorder import Recorder
from genscale.planning.step import noted
from genscale.planning.summary import peaks_of
from genscale.settings.parser import parse_config
from genscale.testing.workers import serve
from genscale.training.setup import averaged_networks, derive_accumulation, prepare
from genscale.training.trainer import Trainer


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    """Of the second step: the peak of all tensors' bytes; of the optimizer's collectives the bytes by name; and of gathered
    weights the bytes by part of the step and number of processes."""
    zero.LIVE = variant["live"]
    config = parse_config(FAMILIES, variant["flags"])
    objective = family(config.model.family).blueprint(config).objective
    processes.split_sequences(config.parallel.context)
    objective.split_sequences(processes.part)
    micro_batch, accumulation = derive_accumulation(config.train, processes.world_size, config.parallel.context)
    recorder = Recorder()
    processes.note = lambda doing: noted(recorder, doing)  # type: ignore[method-assign]
    shape = micro_batch, config.data.sequence_length + 1
    with recorder.recording():
        engine = build_engine(plan, processes, config.parallel, plan.precision, config.train.clip, micro_batch, accumulation)
        averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
        prepare(engine, objective, config.optimizer, averaged, None, None)
        trainer = Trainer(config, objective, engine, loader=None, hooks=[], last_good=lambda: "none")
        (phase,) = objective.phases
        for step in (1, 2):
            gc.collect()
            first = len(recorder.events)
            recorder.at(phase=phase.name if step == 2 else "", micro_batch=-1, part="forward", region="", layer="")
            batches = [{"tokens": torch.randint(0, 256, shape), "sample": torch.arange(micro_batch)}
                       for _ in range(accumulation)]
            trainer.run_phase(phase, step, batches)
    sent: dict[str, int] = defaultdict(int)
    gathered: dict[tuple[str, int], int] = defaultdict(int)
    for (_, _, part), collectives in recorder.collectives.items():
        for (collective, _), count in collectives.items():
            if part == "optimizer":
                sent[collective.name] += count * collective.bytes
            elif collective.name == "all_gather":
                gathered[part, len(collective.ranks)] += count * collective.bytes
    return {"peak": round(max(peak.total for peak in peaks_of(recorder, first).values())), "sent": dict(sent),
            "gathered": dict(gathered)}


if __name__ == "__main__":
    serve(answer, {"live": zero.LIVE})
