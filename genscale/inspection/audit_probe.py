"""What an audit looks at: the gradient of one term alone, whether a network is still the same to the last bit, and samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.objectives.base import Phase
from genscale.parallel.averages import local
from genscale.parallel.engine import Engine
from genscale.parallel.materialise import named_state
from genscale.rng import Draws

MicroBatches = Sequence[Mapping[str, Tensor]]
Identity = tuple[int, str]
"""What tells a sample from others: its global number, and a hash of its content."""


def term_gradients(engine: Engine, phase: Phase, seed: int, step: int, batches: MicroBatches) -> dict[str, dict[str, Tensor]]:
    """Gradients of each weighted term by itself, as the phase is about to compute them.

    By term, then by "<network>/<parameter>": the sum over this process's micro-batches, fp32, of each parameter the term
    reaches; empty for a term that reaches none. Leaves weights and running statistics as they were.
    """
    device = engine.processes.device
    gradients: dict[str, dict[str, Tensor]] = {}
    for batch in batches:
        draws = Draws(seed, phase.name, step, batch["sample"], device)
        batch = {key: value if key == "sample" else value.to(device) for key, value in batch.items()}
        names, done = [""], 0
        while done < len(names):  # a forward for each term: the graph is gone after one backward
            with buffers_kept(engine):  # each begins with the singular vectors that the phase's own will begin with
                terms = terms_of(engine, phase, batch, draws)
                names = [name for name in terms if name not in phase.statistics]
                _add(gradients.setdefault(names[done], {}), _gradient(engine, terms[names[done]]))
            done += 1
    return gradients


def terms_of(engine: Engine, phase: Phase, batch: Mapping[str, Tensor], draws: Draws) -> dict[str, Tensor]:
    """What the phase's loss says of a micro-batch on the engine's device, its network in training and the others frozen."""
    engine.train_only(phase.network, phase.second_order)
    engine.modules[phase.network].train()
    engine.begin_update(phase.network)
    with engine.forward_context():
        return phase.loss(engine.modules, batch, draws)


def _gradient(engine: Engine, term: Tensor) -> dict[str, Tensor]:
    # Whoever has thawed another network meanwhile is found out: its parameters are asked for, too.
    parameters = {f"{name}/{key}": parameter for name, module in engine.modules.items()
                  for key, parameter in module.named_parameters() if parameter.requires_grad}
    if not term.requires_grad:
        return {}
    found = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
    return {key: gradient.float() for key, gradient in zip(parameters, found, strict=True) if gradient is not None}


def _add(total: dict[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    for key, gradient in gradients.items():
        total[key] = total[key] + gradient if key in total else gradient


@contextmanager
def buffers_kept(engine: Engine) -> Iterator[None]:
    """Afterwards every buffer is as before."""
    buffers = [buffer for module in engine.modules.values() for buffer in module.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)


def fingerprints(engine: Engine, name: str) -> dict[str, str]:
    """A hash of every weight and persistent buffer of a network, and of the gradients that are there. Collective."""
    parameters = dict(engine.modules[name].named_parameters())
    marks = {f"{'weight' if key in parameters else 'buffer'} {key}": _hash(tensor.numpy())
             for key, tensor in engine.network_state(name)}
    for key, parameter in parameters.items():
        if parameter.grad is not None:
            marks[f"gradient of {key}"] = _hash(local(parameter.grad).float().cpu().numpy())
    return marks


def copies(engine: Engine, name: str) -> dict[str, str]:
    """A hash of every weight and persistent buffer of a network as this process holds it, where each holds all of it."""
    return {key: _hash(tensor.detach().float().cpu().numpy()) for key, tensor in named_state(engine.modules[name])}


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The names under which two fingerprints of a network differ."""
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def identities(batches: MicroBatches) -> list[Identity]:
    """The identity of every sample in this process's micro-batches."""
    found = []
    for batch in batches:
        arrays = {key: value.numpy() for key, value in sorted(batch.items()) if key != "sample"}
        for row, number in enumerate(batch["sample"].tolist()):
            found.append((number, _hash(*(array[row] for array in arrays.values()))))
    return found


def repeated(by_rank: Sequence[Sequence[Identity]]) -> list[str]:
    """What is wrong with the samples of a step, each as text: a number, or a content, that came more than once."""
    numbers: dict[int, int] = {}
    contents: dict[str, tuple[int, int]] = {}  # sample and rank
    found = []
    for rank, samples in enumerate(by_rank):
        for number, content in samples:
            if number in numbers:
                found.append(f"sample {number} on rank {numbers[number]} and again on rank {rank}")
            elif content in contents:
                other, where = contents[content]
                found.append(f"sample {other} on rank {where} and sample {number} on rank {rank} have the same content")
            numbers.setdefault(number, rank)
            contents.setdefault(content, (number, rank))
    return found


def _hash(*arrays: Any) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype} {np.shape(array)}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
