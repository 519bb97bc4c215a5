"""The step of a deep network from those of shallow ones: what a block adds, each block more adds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple, TypeVar

from torch import nn

from genscale.errors import UserError
from genscale.models.network_parts import blocks_of
from genscale.objectives.base import Objective
from genscale.planning.recorder import Moment
from genscale.planning.summary import Peak, Summary
from genscale.settings.config import Config

DEPTHS, CHECK = (3, 4), 6
"""Blocks of the networks that are traced for a deeper one, and of one more that must be what these foretell. Where blocks are
sharded, a deep network holds three of them gathered: the one that goes back, the one before it, and the one that is given back.
"""
AGREEMENT = 0.001
Key = TypeVar("Key", bound=NamedTuple)


class NotForetold(UserError):
    """A deep network does not follow from shallow ones: a run of it can be trained and cannot be planned."""


def can_be_foretold(config: Config, objective: Objective) -> bool:
    """Whether the networks have `model.layers` equal blocks each, or none, and these are more than would be traced."""
    layers = getattr(config.model, "layers", 0) - config.parallel.prefetch_blocks
    stacks = [blocks for network in objective.networks.values() if (blocks := blocks_of(network))]
    return bool(stacks) and layers > CHECK and all(len(blocks) == config.model.layers and _alike(blocks) for blocks in stacks)


def _alike(blocks: list[nn.Module]) -> bool:
    shapes = [[(type(block), name, value.shape) for name, value in block.named_parameters()] for block in blocks]
    return all(each == shapes[0] for each in shapes)


def with_depth(config: Config, layers: int) -> Config:
    """The same run of a network of so many blocks."""
    model: Any = replace(config.model, layers=layers)
    return replace(config, model=model)


def foretold(trace: Callable[[int], Summary], layers: int, more: int = 0) -> Summary:
    """The summary of a network of so many blocks.

    Args:
        trace: gives that of one that is traced.
        more: blocks that are gathered ahead.

    Raises:
        NotForetold: blocks do not add up.
    """
    depths = DEPTHS[0] + more, DEPTHS[1] + more
    first, second = (trace(depth) for depth in depths)
    third = trace(CHECK + more)
    expected, found = extrapolated(first, second, depths, CHECK + more).peak.total, third.peak.total
    if abs(expected - found) > AGREEMENT * found:
        raise NotForetold(f"model.layers: {layers} blocks cannot be planned from {depths[0]} and {depths[1]}: of {CHECK + more}"
                          f" these foretell {expected / 2**20:,.1f} MiB, and {found / 2**20:,.1f} MiB were found; set "
                          f"model.layers to at most {CHECK + more}")
    deep = extrapolated(first, second, depths, layers)
    # Gaps do not lie on lines: their share of the peak differs twofold from one depth to the next.
    share = median(each.kept / each.peak.total for each in (first, second, third))
    return replace(deep, kept=share * deep.peak.total)


def extrapolated(first: Summary, second: Summary, depths: tuple[int, int], layers: int) -> Summary:
    """On the straight line through two summaries, of these depths."""
    share = (layers - depths[0]) / (depths[1] - depths[0])

    def line(a: float, b: float) -> float:
        return a + (b - a) * share

    peaks = {}
    for place, end in second.peaks.items():
        start = first.peaks.get(place, end)
        categories = start.bytes.keys() | end.bytes.keys()
        held = {each: line(start.bytes.get(each, 0), end.bytes.get(each, 0)) for each in categories}
        peaks[place] = Peak(held, _deeper(end.moment, depths[1], layers))
    deep = Summary(peaks, _lines(first.work, second.work, line), _lines(first.collectives, second.collectives, line),
                   line(first.at_rest, second.at_rest), second.kept,
                   line(first.most_gathered or 0, second.most_gathered or 0) or None, line(first.host, second.host))
    times = rounds(deep) / rounds(second)
    dealt = {key: tuple(times * value for value in second.work[key]) for key in deep.work
             if key.part == "optimizer" and key.kind == "product"}
    return replace(deep, work=deep.work | dealt)


def rounds(summary: Summary) -> int:
    """In which Muon's matrices are dealt out to the processes, which send each other what they have made: in each, a process
    makes one matrix orthogonal, also in a last one that is not full. 1 where nothing is dealt out."""
    sent = [(len(key.ranks), values[0]) for key, values in summary.collectives.items() if key.name == "broadcast"]
    return max((math.ceil(round(sum(count for _, count in sent) / ranks, 6)) for ranks, _ in sent), default=1)


def _deeper(moment: Moment, traced: int, layers: int) -> Moment:
    """Blocks are numbered from the end of the network that is nearer."""
    name, _, number = moment.layer.rpartition(".")
    if not number.isdecimal() or int(number) < traced / 2:
        return moment
    return moment._replace(layer=f"{name}.{int(number) + layers - traced}")


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
