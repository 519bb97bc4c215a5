"""The step of a deep network from those of shallow ones: what a block adds, each block more adds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from torch import nn

from genscale.errors import UserError
from genscale.models.network_parts import blocks_of
from genscale.objectives.base import Objective
from genscale.planning.recorder import Moment
from genscale.planning.summary import Peak, Summary
from genscale.settings.config import Config

DEPTHS, CHECK = (2, 4), 6
"""Blocks of the networks that are traced for a deeper one, and of one more that must be what these foretell."""
AGREEMENT = 0.001
Key = TypeVar("Key", bound=NamedTuple)


def can_be_foretold(config: Config, objective: Objective) -> bool:
    """Whether the networks have `model.layers` equal blocks each, or none, and these are more than would be traced."""
    layers = getattr(config.model, "layers", 0)
    stacks = [blocks for network in objective.networks.values() if (blocks := blocks_of(network))]
    return bool(stacks) and layers > CHECK and all(len(blocks) == layers and _alike(blocks) for blocks in stacks)


def _alike(blocks: list[nn.Module]) -> bool:
    shapes = [[(type(block), name, value.shape) for name, value in block.named_parameters()] for block in blocks]
    return all(each == shapes[0] for each in shapes)


def with_depth(config: Config, layers: int) -> Config:
    """The same run of a network of so many blocks."""
    model: Any = replace(config.model, layers=layers)  # type: ignore[type-var]
    return replace(config, model=model)


def foretold(trace: Callable[[int], Summary], layers: int) -> Summary:
    """The summary of a network of so many blocks.

    Args:
        trace: gives that of one that is traced.

    Raises:
        UserError: blocks do not add up.
    """
    first, second = (trace(depth) for depth in DEPTHS)
    expected, found = extrapolated(first, second, CHECK).peak.total, trace(CHECK).peak.total
    if abs(expected - found) > AGREEMENT * found:
        raise UserError(f"model.layers: {layers} blocks cannot be planned from {DEPTHS[0]} and {DEPTHS[1]}: of {CHECK} these "
                        f"foretell {expected / 2**20:,.1f} MiB, and {found / 2**20:,.1f} MiB were found; set model.layers to "
                        f"at most {CHECK}")
    return extrapolated(first, second, layers)


def extrapolated(first: Summary, second: Summary, layers: int) -> Summary:
    """On the straight line through two summaries, of the depths `DEPTHS`."""
    share = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    def line(a: float, b: float) -> float:
        return a + (b - a) * share

    peaks = {}
    for place, end in second.peaks.items():
        start = first.peaks.get(place, end)
        categories = start.bytes.keys() | end.bytes.keys()
        held = {each: line(start.bytes.get(each, 0), end.bytes.get(each, 0)) for each in categories}
        peaks[place] = Peak(held, _deeper(end.moment, layers))
    return Summary(peaks, _lines(first.work, second.work, line), _lines(first.collectives, second.collectives, line),
                   line(first.at_rest, second.at_rest), line(first.kept, second.kept))


def _deeper(moment: Moment, layers: int) -> Moment:
    """The last block is the last of the deeper network."""
    last = re.sub(rf"\b{DEPTHS[1] - 1}$", str(layers - 1), moment.layer)
    return moment._replace(layer=last)


def _lines(first: Mapping[Key, tuple[float, ...]], second: Mapping[Key, tuple[float, ...]],
           line: Callable[[float, float], float]) -> dict[Key, tuple[float, ...]]:
    """Values by key. What only one of the two has (kernels that take all tensors at once, buckets of gradients) is added up by
    what else it is, without its size."""
    first, second = _joined(first, second), _joined(second, first)
    found = {}
    for key, end in second.items():
        start = first.get(key, (0.0,) * len(end))
        found[key] = tuple(max(line(a, b), 0.0) for a, b in zip(start, end, strict=True))
    return found


def _joined(mine: Mapping[Key, tuple[float, ...]], other: Mapping[Key, tuple[float, ...]]) -> dict[Key, tuple[float, ...]]:
    found: dict[Key, list[float]] = defaultdict(list)
    for key, values in mine.items():
        common = key if key in other else _without_size(key)
        before = found.get(common) or [0.0] * len(values)
        found[common] = [a + b for a, b in zip(before, values, strict=True)]
    return {key: tuple(values) for key, values in found.items()}


def _without_size(key: Key) -> Key:
    sizes = {"shape": (), "bytes": 0}
    return key._replace(**{name: value for name, value in sizes.items() if name in key._fields})
