"""What a family's losses owe the promise, looked at in one process: initial weights for every tensor, every random number from
`draws`, and terms that are sums over the samples."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from genscale.families import family
from genscale.inspection.audit_probe import buffers_kept, terms_of
from genscale.interop.starting import complete_from, weights_from
from genscale.objectives.base import Objective, Phase
from genscale.parallel.engine import Engine
from genscale.parallel.materialise import named_state
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.rng import Draws
from genscale.settings.config import Config
from genscale.training.setup import averaged_networks, derive_accumulation, open_loader, open_objective, prepare

ROUNDING_OF_SUMS = 1e-4
"""Largest difference between the terms of a batch and the sum of those of its halves, relative to these, in fp32."""


@dataclass
class LossFindings:
    """What was found, in lines; nothing where all is well.

    Attributes:
        objective: the name of its class.
        tensors, values: of all networks: parameters and persistent buffers, and their elements.
        terms: by phase.
        averaged: the objective has networks to keep an average of.
        couples_samples: a loss depends on which samples share a micro-batch, so that its terms are no sums.
        splits_sequences: several processes can compute parts of one sample.
        weights, draws, sums: what is wrong with the initial weights, with random numbers, and with the terms.
    """

    objective: str
    averaged: bool
    couples_samples: bool
    splits_sequences: bool
    tensors: int = 0
    values: int = 0
    terms: dict[str, list[str]] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)
    sums: list[str] = field(default_factory=list)


def look_at_losses(config: Config) -> LossFindings:
    """Build what a run of the config would train, and try each phase's loss on the first global batch.

    Raises:
        UserError: as `train` does before its first step.
    """
    plan = plan_parallel(config.parallel, config.train.precision, config.optimizer.name)
    micro_batch_size, accumulation = derive_accumulation(config.train, 1)
    processes = Processes(need_group=plan.needs_group)
    data = loader = None
    try:
        config, data_settings = complete_from(config)
        data = family(config.model.family).build_data(data_settings, config.run.seed)
        objective = open_objective(config, processes, plan, data)
        found = LossFindings(type(objective).__name__, bool(objective.averaged), objective.couples_samples,
                             type(objective).split_sequences is not Objective.split_sequences)
        _look_at_weights(objective, found)
        if found.weights:
            return found
        engine = build_engine(plan, processes, config.parallel, config.train.precision, config.train.clip, micro_batch_size,
                              accumulation)
        averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
        prepare(engine, objective, config.optimizer, averaged, None, weights_from(config.model))
        loader = open_loader(data, config.data, config.train.global_batch_size, micro_batch_size, processes)
        batch = loader.next_batch()[0]
        for phase in objective.phases:
            _look_at_phase(engine, phase, batch, config.run.seed, found)
        return found
    finally:
        for opened in (loader, data):
            if opened is not None:
                opened.close()
        processes.close()


def _look_at_weights(objective: Objective, found: LossFindings) -> None:
    for name, network in objective.networks.items():
        drawn = objective.initial_weights(name)
        for key, tensor in named_state(network):
            found.tensors, found.values = found.tensors + 1, found.values + tensor.numel()
            try:
                values, again = drawn(key), drawn(key)
            except Exception as error:  # whatever a family's own code raises
                found.weights.append(f"{name}.{key}: {type(error).__name__}: {error}")
                continue
            if tuple(values.shape) != tuple(tensor.shape):
                found.weights.append(f"{name}.{key} is {tuple(tensor.shape)}, and is drawn as {tuple(values.shape)}")
            elif values.is_floating_point() != tensor.is_floating_point():
                found.weights.append(f"{name}.{key} is {tensor.dtype}, and is drawn as {values.dtype}")
            elif values.is_floating_point() and not values.isfinite().all():
                found.weights.append(f"{name}.{key} is drawn with values that are no numbers")
            elif not torch.equal(values, again):
                found.weights.append(f"{name}.{key} is drawn anew each time; draw it by seed and name")


def _look_at_phase(engine: Engine, phase: Phase, batch: Mapping[str, Tensor], seed: int, found: LossFindings) -> None:
    whole = _terms(engine, phase, batch, seed)
    found.terms[phase.name] = list(whole)
    again = _terms(engine, phase, batch, seed, other_chance=1)
    moved = [name for name, value in whole.items() if value != again[name] and not math.isnan(value)]
    if moved:
        found.draws.append(f"phase {phase.name}: {', '.join(moved)} changes with the random state of torch, NumPy or Python; "
                           "take every random number from `draws`")
    if found.couples_samples or moved:
        return
    half = len(batch["sample"]) // 2
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(half), slice(half, None))]
    if phase.count(batch) != sum(map(phase.count, parts)):
        found.sums.append(f"phase {phase.name}: count is {phase.count(batch)} of a batch and "
                          f"{' + '.join(str(phase.count(part)) for part in parts)} of its halves")
    halves = [_terms(engine, phase, part, seed) for part in parts]
    for name, value in whole.items():
        a, b = (terms.get(name, math.nan) for terms in halves)
        if not abs(value - a - b) <= ROUNDING_OF_SUMS * max(abs(value), abs(a) + abs(b)):
            found.sums.append(f"phase {phase.name}: {name} is {value:.6g} of a batch and {a:.6g} + {b:.6g} of its halves; a "
                              "term is the sum over the samples, not a mean")


def _terms(engine: Engine, phase: Phase, batch: Mapping[str, Tensor], seed: int, other_chance: int = 0) -> dict[str, float]:
    """By name. What is drawn past `draws` is another thing for each `other_chance`."""
    device = engine.processes.device
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), buffers_kept(engine):
        random.seed(other_chance)
        np.random.seed(other_chance)
        torch.manual_seed(other_chance)
        try:
            draws = Draws(seed, phase.name, 1, batch["sample"], device)
            on_device = {key: value if key == "sample" else value.to(device) for key, value in batch.items()}
            return {name: float(term.detach()) for name, term in terms_of(engine, phase, on_device, draws).items()}
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
