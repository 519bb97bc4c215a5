"""A plan as one JSON object, for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from genscale.planning.choose import Candidate, Choices
from genscale.planning.plan import Plan


def as_dict(plan: Plan, choices: Choices | None = None) -> dict[str, Any]:
    """Bytes, seconds and FLOP; shares are of 1."""
    memory, time, parallel, train = plan.step.memory, plan.time, plan.config.parallel, plan.config.train
    said: dict[str, Any] = {
        "run": plan.config.run.name, "verdict": plan.verdict, "fits": plan.fits,
        "machine": {**dataclasses.asdict(plan.machine), "device": plan.gpu.device, "memory": plan.gpu.memory_bytes,
                    "origin": plan.gpu.origin},
        "settings": {"strategy": parallel.strategy, "shard_size": parallel.shard_size, "context": parallel.context,
                     "offload": parallel.offload,
                     "activation_checkpointing": parallel.activation_checkpointing, "compile": parallel.compile,
                     "precision": train.precision, "global_batch_size": train.global_batch_size,
                     "micro_batch_size": plan.step.micro_batch_size, "accumulation": plan.step.accumulation},
        "parameters": plan.step.parameters,
        "memory": {"peak": plan.peak, "expected_error": plan.expected_error, "spare": plan.terms.spare,
                   "at_rest": memory.at_rest, "phase": memory.phase, "part": memory.part, "layer": memory.layer,
                   "parts": [dataclasses.asdict(part) for part in sorted(memory.parts, key=lambda part: part.category)]},
        "time": {"step": time.step, "spread": time.spread, "mfu": time.mfu, "model_flops": time.model_flops,
                 f"{plan.unit}_per_second": plan.units_per_second,
                 "parts": [dataclasses.asdict(part) for part in time.parts]},
        "whole": {"steps": plan.steps, "seconds": plan.seconds, "gpu_hours": plan.gpu_hours, "money": plan.money},
        "checkpoint": {"bytes": memory.checkpoint_bytes, "seconds": plan.checkpoint_seconds,
                       "every": plan.steps_between_checkpoints, "share": plan.checkpoint_share},
    }
    if choices is not None:
        said["choices"] = {"goal": choices.goal, "left_out": choices.left_out, "unplanned": list(choices.unplanned),
                           "better": [_candidate(each) for each in choices.better],
                           "fitting": [_candidate(each) for each in choices.fitting],
                           "unfit": [_candidate(each) for each in choices.unfit]}
    return said


def _candidate(each: Candidate) -> dict[str, Any]:
    plan = each.plan
    return {"changes": each.changes, "verdict": plan.verdict, "peak": plan.peak, "step": plan.time.step,
            "seconds": plan.seconds, "gpu_hours": plan.gpu_hours, "money": plan.money, "gpus": plan.machine.gpus}
