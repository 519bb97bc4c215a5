"""trace.jsonl: digests of what went into every step and of what it made, by which `genscale compare` finds where runs part.

One JSON object a step, the same at any sharding wherever the numbers are equal bit for bit:

    step        0 is the state before the first step, with `weights` alone
    batch       digest of the step's global samples (the ledger)
    draws       digest of all random numbers drawn for it
    made        what was made of them, where a phase says so (`Draws.made`): by name and sample, the tokens
    metrics     losses, gradient norms and learning rates, as in metrics.jsonl
    gradients   by network (and update, where a step has several): after the reduction, before clipping
    weights     by network, after the step

of a network: {tensor: [digest, norm, projection]} (`genscale.training.fingerprints`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.hook import Hook, Order, StepReport
from genscale.parallel.engine import Engine, named_state
from genscale.parallel.pieces import Piece
from genscale.rng import Draws
from genscale.tracking.metrics_file import MetricsFile, read_metrics
from genscale.tracking.writes import Writes
from genscale.training.fingerprints import Fingerprint, Fingerprints, digest_of

NAME = "trace.jsonl"


class Trace(Hook):
    """Writes the trace of a run; on rank 0, with a share of the work on every rank.

    Args:
        folder: of the run.
        done: the step that the run goes on from; what an earlier life of the run wrote of later ones is dropped.
        writes: how to write what the run can do without.
    """

    name, order = "trace", Order.TRACE

    def __init__(self, folder: Path, engine: Engine, done: int, writes: Writes) -> None:
        self.engine, self.processes, self._writes = engine, engine.processes, writes
        self._draws, self._drawn = 0, set[tuple[str, int]]()
        self._made: dict[str, dict[int, list[Any]]] = {}
        self._gradients: dict[str, Fingerprints] = {}
        if self.processes.is_main:
            self.file = MetricsFile(folder / NAME)
        self._truncate_after(done)
        engine.on_gradients = self._note_gradients
        known = self.processes.is_main and any(record["step"] == done for record in read_metrics(folder / NAME))
        if not self.processes.main_does(lambda: known):
            weights = self._weights()
            if self.processes.is_main:
                self.file.append(done, {"weights": weights})

    def draws(self, seed: int, scope: str, step: int, samples: Tensor, device: torch.device) -> Draws:
        """Like `Draws`, noting what is drawn."""
        return _NotedDraws(self, seed, scope, step, samples, device)

    def step(self, report: StepReport) -> None:
        """Write the line of a step. Collective."""
        self._writes.attempt(NAME, lambda: self._record(report))

    def _record(self, report: StepReport) -> None:
        (draws,) = self.processes.sum_of_numbers(self.processes.once(self._draws))
        made = merged(self.processes.gather(self._made)) if self._made else {}
        gradients = {label: _as_json(prints.total(self.processes)) for label, prints in self._gradients.items()}
        weights = self._weights()
        self._forget()
        if self.processes.is_main:
            self.file.append(report.step, {"batch": _hex(report.data_digest), "draws": _hex(draws), **made,
                                           "metrics": report.metrics, "gradients": gradients, "weights": weights})

    def rolled_back(self, step: int) -> None:
        """The run goes on from that step: what follows it will be written again."""
        self._writes.attempt(NAME, lambda: self._truncate_after(step))

    def _truncate_after(self, step: int) -> None:
        self._forget()
        if self.processes.is_main:
            self.file.truncate_after(step)

    def close(self, failed: bool = False) -> None:
        if self.processes.is_main:
            self._writes.attempt(NAME, self.file.close)

    def note_draws(self, stream: str, sample: int, numbers: Tensor) -> None:
        """A sum over samples, so that neither their order nor the micro-batch they came in matters; a sample's numbers count
        once, also where a recomputed forward draws them again."""
        if (stream, sample) not in self._drawn:
            self._drawn.add((stream, sample))
            total = self._draws + int(digest_of(f"{stream}/{sample}/{numbers.numel()}", 0, numbers))
            self._draws = (total + 2**63) % 2**64 - 2**63  # as int64 wraps

    def note_made(self, what: str, sample: int, tokens: Tensor) -> None:
        """Tokens that were made for a sample."""
        self._made.setdefault(what, {})[sample] = tokens.tolist()

    def _note_gradients(self, network: str, pieces: Iterable[Piece]) -> None:
        """By the engine, in the middle of a step."""
        label, update = network, 1
        while label in self._gradients:
            update += 1
            label = f"{network}, update {update}"
        names = [name for name, _ in self.engine.modules[network].named_parameters()]
        self._gradients[label] = Fingerprints(names, pieces)

    def _weights(self) -> dict[str, dict[str, list[Any]]]:
        found = {}
        for name in self.engine.optimizers:
            prints = Fingerprints([key for key, _ in named_state(self.engine.modules[name])], self.engine.network_pieces(name))
            found[name] = _as_json(prints.total(self.processes))
        return found

    def _forget(self) -> None:
        self._draws = 0
        self._drawn.clear()
        self._made = {}
        self._gradients.clear()


class _NotedDraws(Draws):
    def __init__(self, trace: Trace, *address: Any) -> None:
        super().__init__(*address)
        self._trace = trace

    def normal(self, stream: str, *shape: int) -> Tensor:
        return self._noted(stream, super().normal(stream, *shape))

    def uniform(self, stream: str, *shape: int) -> Tensor:
        return self._noted(stream, super().uniform(stream, *shape))

    def keys(self, stream: str) -> Tensor:
        return self._noted(stream, super().keys(stream))

    def made(self, what: str, tokens: Tensor) -> None:
        for sample, row in zip(self.samples.tolist(), tokens.cpu(), strict=True):
            self._trace.note_made(f"{self.scope}/{what}", sample, row)

    def _noted(self, stream: str, numbers: Tensor) -> Tensor:
        for sample, row in zip(self.samples.tolist(), numbers.detach().cpu(), strict=True):
            self._trace.note_draws(f"{self.scope}/{stream}", sample, row)
        return numbers


def merged(made: list[dict[str, dict[int, list[Any]]]]) -> dict[str, Any]:
    """What all processes made, in the order of the samples."""
    names = dict.fromkeys(name for each in made for name in each)
    joined = {name: {number: tokens for each in made for number, tokens in each.get(name, {}).items()} for name in names}
    return {"made": {name: {str(number): joined[name][number] for number in sorted(joined[name])} for name in names}}


def _as_json(prints: dict[str, Fingerprint]) -> dict[str, list[Any]]:
    """Norms of what is no longer a number become null."""
    return {name: [_hex(each.digest), *(value if math.isfinite(value) else None for value in (each.norm, each.projection))]
            for name, each in prints.items()}


def _hex(number: int) -> str:
    return f"{number % 2**64:016x}"
