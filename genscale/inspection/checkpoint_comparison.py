"""Where the checkpoints of two runs differ: the tensor that differs most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints

KINDS = {"networks": "weights", "optimizers": "optimizer state", "averages": "averaged weights"}


@dataclass(frozen=True)
class CheckpointDifference:
    """Between two checkpoints of one step.

    Attributes:
        of: the network, and what of it.
        tensor: the one whose largest absolute difference is the largest.
        absolute, relative: its largest difference; the norm of its difference over its norm.
        changed, tensors: how many differ, and of how many.
    """

    step: int
    of: str
    tensor: str
    absolute: float
    relative: float
    changed: int
    tensors: int

    def __str__(self) -> str:
        return (f"{self.changed} of {self.tensors} tensors, most {self.tensor} ({self.of}): largest absolute difference "
                f"{self.absolute:.1e}, relative {self.relative:.1e}")


def compare_checkpoints(a: Path, b: Path) -> tuple[list[int], CheckpointDifference | None]:
    """The equal steps of two checkpoint folders that were compared, and the first difference. Damaged ones are left out."""
    of_b = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(b)}
    compared = []
    for one in list_checkpoints(a):
        other = of_b.get(one.step)
        if other is None or one.problem() or other.problem():
            continue
        compared.append(one.step)
        difference = _compare(one, other)
        if difference is not None:
            return compared, difference
    return compared, None


def _compare(one: Checkpoint, other: Checkpoint) -> CheckpointDifference | None:
    most, changed, tensors = None, 0, 0
    for of, name, a, b in _tensors(one, other):
        tensors += 1
        if a is not None and b is not None and a.shape == b.shape:
            if torch.equal(a, b):
                continue
            apart = (a.double() - b.double()).abs()
            size = float(apart.max()), float(apart.norm() / a.double().norm().clamp(min=1e-300))
        else:
            size = float("inf"), float("inf")
        changed += 1
        if most is None or size[0] > most[2]:
            most = of, name, *size
    return CheckpointDifference(one.step, *most, changed, tensors) if most else None


def _tensors(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, str, Tensor | None, Tensor | None]]:
    """(network and what of it, tensor, its two values) of all that either holds."""
    frozen_a, frozen_b = one.state().get("frozen") or {}, other.state().get("frozen") or {}
    for network in sorted(frozen_a.keys() | frozen_b.keys()):
        if frozen_a.get(network, {}).get("sha256") != frozen_b.get(network, {}).get("sha256"):
            yield "frozen network, of another SHA-256", network, None, None
    for kind, words in KINDS.items():
        for network in one.state()["scalers"]:
            if kind == "averages" and not (one.has_average(network) and other.has_average(network)):
                continue
            files = one.tensors(kind, network), other.tensors(kind, network)
            keys = [set(file.keys()) for file in files]
            for key in sorted(keys[0] | keys[1]):
                a, b = (file(key) if key in held else None for file, held in zip(files, keys, strict=True))
                yield f"{words} of {network}", key, a, b
