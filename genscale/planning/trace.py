"""The step of a run, planned: traced as if on the devices that it is planned for, on tensors without values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genscale.families import family
from genscale.models.device_kind import Kind
from genscale.objectives.base import Objective
from genscale.parallel.fsdp2 import WHOLE_GRADIENTS
from genscale.parallel.materialise import materialise, named_state
from genscale.parallel.planned import stood_in_for
from genscale.parallel.strategies import are_compiled, check_objective, plan_elsewhere
from genscale.parallel.torch_optimizers import moments
from genscale.planning.account import Category, Certainty, Machine, MemoryPart, PlannedMemory, PlannedStep
from genscale.planning.depth import can_be_foretold, foretold, with_depth
from genscale.planning.step import Spread, trace_step, without_compiler
from genscale.planning.summary import Summary, summarise
from genscale.settings.config import Config
from genscale.training.optimizers import make_optimizer
from genscale.training.setup import averaged_networks, check_learning_rates, check_settings, derive_accumulation

CPU = "cpu"
"""The profile of a machine that computes on its CPU, one process each."""
CONTEXT, NCCL = int(0.6 * 2**30), int(1.2 * 2**30)
"""Bytes of a GPU that torch does not count: what the driver keeps of a process with torch's kernels and cuBLAS's workspaces
(0.5 to 0.7 GiB on an H100), and NCCL's buffers for two or three communicators with all their channels. Nothing but experience:
both differ by driver, version and topology."""
COUNT = 4
"""Bytes of AdamW's count of steps, which each parameter has."""
CERTAINTY: dict[Category, Certainty] = {"weights": "exact", "optimizer state": "exact", "averages": "exact"}


def plan_step(config: Config, machine: Machine) -> PlannedStep:
    """What one rank holds and does in a step of such a run on such devices, none of which need be here.

    Compiled blocks are planned as they are without a compiler, which keeps less and moves less; but for masks, which
    FlexAttention then takes, and of which nothing is kept.

    Raises:
        UserError: what `genscale train` would refuse there, in the same words; and a family that does not say what a sample is.
    """
    check_settings(config)
    plan = plan_elsewhere(config.parallel, config.train.precision, machine.gpus, config.optimizer.name)
    config, compiled = without_compiler(plan.settled(config)), are_compiled(plan, config.parallel)
    plan = replace(plan, precision=config.train.precision)
    micro_batch_size, accumulation = derive_accumulation(config.train, machine.gpus, plan.context)
    objective = family(config.model.family).blueprint(config).objective
    check_objective(plan, config.parallel, objective)
    check_learning_rates(config.optimizer, config.model.family, objective)
    parameters = sum(parameter.numel() for network in objective.networks.values() for parameter in network.parameters())
    spread = Spread(plan, micro_batch_size, accumulation, parameters, compiled)
    summary = _summary(config, spread, "cpu" if machine.gpu == CPU else "gpu", objective)
    samples = config.train.global_batch_size
    return PlannedStep(
        parameters=parameters, samples=samples,
        tokens=samples * objective.units_per_sample if objective.unit == "tokens" else None,
        micro_batch_size=micro_batch_size, accumulation=accumulation,
        memory=_memory(summary, machine, plan.strategy, checkpoint_bytes(config, objective)),
        operations=summary.operations(), exchanges=summary.exchanges(machine.gpus_per_node))


def _summary(config: Config, spread: Spread, kind: Kind, objective: Objective) -> Summary:
    if not can_be_foretold(config, objective):
        return summarise(trace_step(config, family(config.model.family).blueprint(config), spread, kind))

    settled = _reducing_as_deep(config, objective)

    def trace(layers: int) -> Summary:
        shallow = with_depth(settled, layers)
        return summarise(trace_step(shallow, family(config.model.family).blueprint(shallow), spread, kind))

    return foretold(trace, config.model.layers, config.parallel.prefetch_blocks)


def _reducing_as_deep(config: Config, objective: Objective) -> Config:
    """With gradients summed as often as at the full depth: shallow networks would be below the limit of `auto`."""
    if config.parallel.reduce_gradients != "auto":
        return config
    trained = [network for name, network in objective.networks.items() if name not in objective.frozen]
    largest = max(sum(parameter.numel() for parameter in network.parameters()) for network in trained)
    often: Any = "every_micro_batch" if 4 * largest > WHOLE_GRADIENTS else "last_micro_batch"
    return replace(config, parallel=replace(config.parallel, reduce_gradients=often))


def _memory(summary: Summary, machine: Machine, strategy: str, checkpoint_bytes: int) -> PlannedMemory:
    peak = summary.peak
    categories: dict[Any, Certainty] = {**CERTAINTY}  # a recorder's are plain texts
    for stand_in in stood_in_for(strategy):
        categories[stand_in] = "modelled"
    parts = [MemoryPart(cast(Category, category), round(held), categories.get(category, "traced"))
             for category, held in peak.bytes.items() if round(held)]
    if machine.gpu != CPU:
        parts.append(MemoryPart("caching allocator", max(0, round(summary.kept)), "replayed"))
        parts.append(MemoryPart("CUDA and NCCL", CONTEXT + (NCCL if machine.gpus > 1 else 0), "assumed"))
    moment = peak.moment
    return PlannedMemory(tuple(parts), round(summary.at_rest), moment.phase, moment.part, moment.layer, checkpoint_bytes,
                         round(summary.host))


def checkpoint_bytes(config: Config, objective: Objective) -> int:
    """Of the tensors of a whole checkpoint: weights and averages in fp32, and what the optimizer keeps."""
    averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
    total = 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, network in objective.networks.items():
            if name in objective.frozen:
                continue
            materialise(network, torch.device("cpu"))
            held = sum(tensor.nbytes for _, tensor in named_state(network))
            optimizer = make_optimizer(network, config.optimizer, config.train.precision)
            state = sum(parameter.nbytes * moments(group) + (COUNT if "betas" in group else 0)
                        for group in optimizer.param_groups for parameter in group["params"])
            total += held * (2 if name in averaged else 1) + state
    return total
