"""Several sources mixed by weight: which of them gives a lane's k-th block is a pure function of (seed, lane, k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from genscale.data.lanes import Cursor, Sample
from genscale.rng import numpy_generator

CHOICES = 1024
"""Choices drawn at a time."""

OpenLane = Callable[[int, Cursor | None], Iterator[tuple[Sample, Cursor]]]


def choices(weights: Sequence[float], seed: int, lane: int, position: int) -> Iterator[int]:
    """The source of each block of a lane from `position` on, without end: source i with probability weights[i] / sum."""
    bounds = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))[:-1]
    chunk, skip = divmod(position, CHOICES)
    while True:
        draws = numpy_generator(seed, "mixture", lane, chunk).random(CHOICES)
        yield from np.searchsorted(bounds, draws[skip:], side="right").tolist()
        chunk, skip = chunk + 1, 0


def mix(sources: Sequence[OpenLane], weights: Sequence[float], seed: int, lane: int,
        cursor: Cursor | None) -> Iterator[tuple[Sample, Cursor]]:
    """Endless samples of a lane, drawn from its lane of each source. All blocks being equally long, the weights are shares of
    tokens.

    The cursor holds each source's own cursor, and `blocks`: how many blocks came from each.
    """
    cursor = cursor or {"blocks": [0] * len(sources), "sources": [None] * len(sources)}
    blocks, cursors = list(cursor["blocks"]), list(cursor["sources"])
    lanes: dict[int, Iterator[tuple[Sample, Cursor]]] = {}
    for source in choices(weights, seed, lane, sum(blocks)):
        if source not in lanes:
            lanes[source] = sources[source](lane, cursors[source])
        sample, cursors[source] = next(lanes[source])
        blocks[source] += 1
        yield sample, {"blocks": blocks.copy(), "sources": cursors.copy()}


def allot(count: int, weights: Sequence[float]) -> list[int]:
    """`count` in whole parts as the weights have it, by largest remainders; at least 1 each."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * count
    parts = np.floor(exact).astype(int)
    for index in np.argsort(parts - exact, kind="stable")[: count - int(parts.sum())]:
        parts[index] += 1
    return np.maximum(parts, 1).tolist()


def interleave(documents: Sequence[Iterator[str]], weights: Sequence[float]) -> Iterator[str]:
    """The sources' documents, each source once, in turns that keep the characters read in proportion to the weights for as long
    as all of them last."""
    remaining, read = dict(enumerate(documents)), [0.0] * len(documents)
    while remaining:
        source = min(remaining, key=lambda index: (read[index], index))
        text = next(remaining[source], None)
        if text is None:
            del remaining[source]
        else:
            read[source] += max(1, len(text)) / weights[source]
            yield text
