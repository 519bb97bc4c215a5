"""What a traced step comes to: the peaks of its parts, its operations and its collectives; and the same of a deeper network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from genscale.planning.account import Exchange, Kind, Operation, Part
from genscale.planning.allocator import replay
from genscale.planning.recorder import Moment, Recorder
from genscale.planning.step import HOST, Traced

Place = tuple[str, int, str, str]
"""Phase, micro-batch, part and region: in what happens there, memory grows by the same with each block more."""


@dataclass(frozen=True)
class Peak:
    """Bytes by category where a place holds the most."""

    bytes: Mapping[str, float]
    moment: Moment

    @property
    def total(self) -> float:
        return sum(self.bytes.values())


class OperationKey(NamedTuple):
    """What operations are told apart by."""

    name: str
    kind: Kind
    phase: str
    part: Part
    head: bool
    shape: tuple[int, ...]
    dtype: str


class ExchangeKey(NamedTuple):
    """What collectives are told apart by."""

    name: str
    phase: str
    part: Part
    ranks: tuple[int, ...]
    hidden: bool
    last_only: bool
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A step, added up.

    Attributes:
        peaks: by place.
        work: calls, FLOPs and bytes of a step.
        collectives: calls and bytes of a step.
        kept: bytes that the caching allocator holds beyond those that are allocated, at their peak.
        host: the most bytes that are in host memory.
    """

    peaks: dict[Place, Peak]
    work: dict[OperationKey, tuple[float, ...]]
    collectives: dict[ExchangeKey, tuple[float, ...]]
    at_rest: float
    kept: float
    most_gathered: float | None = None
    host: float = 0

    @property
    def peak(self) -> Peak:
        most = max(self.peaks.values(), key=lambda peak: peak.total)
        gathered = most.bytes.get("gathered weights", 0)
        if self.most_gathered is None or gathered <= self.most_gathered:
            return most
        return Peak({**most.bytes, "gathered weights": self.most_gathered}, most.moment)

    def operations(self) -> tuple[Operation, ...]:
        return tuple(Operation(*key, flops=flops / count, bytes=round(moved / count), count=count)
                     for key, (count, flops, moved) in self.work.items() if count > 0)

    def exchanges(self, gpus_per_node: int) -> tuple[Exchange, ...]:
        return tuple(Exchange(key.name, key.phase, key.part, round(moved / count), len(key.ranks),  # type: ignore[arg-type]
                              len({rank // gpus_per_node for rank in key.ranks}) == 1, key.hidden, count,
                              key.last_only)
                     for key, (count, moved) in self.collectives.items() if count > 0)


def summarise(traced: Traced) -> Summary:
    """Add up what was recorded."""
    recorder = traced.recorder
    work: dict[OperationKey, list[float]] = defaultdict(lambda: [0.0] * 3)
    for (phase, micro_batch, part, head), calls in recorder.work.items():
        times = traced.times_of(phase, micro_batch, part)
        for each, count in calls.items():
            key = OperationKey(each.name, each.kind, phase, part, head, each.shape, each.dtype)
            for place, value in enumerate((1.0, each.flops, float(each.bytes))):
                work[key][place] += times * count * value
    collectives: dict[ExchangeKey, list[float]] = defaultdict(lambda: [0.0] * 2)
    for (phase, micro_batch, part), sent in recorder.collectives.items():
        times = traced.times_of(phase, micro_batch, part)
        before = recorder.collectives.get((phase, 0, part), {}) if micro_batch > 0 and part == "backward" else sent
        for (collective, hidden), count in sent.items():
            last_only = (collective, hidden) not in before
            exchange = ExchangeKey(collective.name, phase, part, collective.ranks, hidden, last_only, collective.bytes)
            collectives[exchange][0] += times * count
            collectives[exchange][1] += times * count * collective.bytes
    peaks = peaks_of(recorder, traced.first)
    kept = replay(_two_steps(traced), expandable=True).reserved - max(peak.total for peak in peaks.values())
    return Summary(peaks, {key: tuple(values) for key, values in work.items()},
                   {key: tuple(values) for key, values in collectives.items()}, traced.at_rest, kept, traced.most_gathered,
                   _most_on_host(recorder))


def _most_on_host(recorder: Recorder) -> int:
    sizes = (size for storage, size, _ in recorder.events if storage.category == HOST)
    return max(accumulate(sizes), default=0)


def _two_steps(traced: Traced) -> Iterator[tuple[int, int]]:
    """Births and deaths of two steps, after those of what is there between steps."""
    events, before = traced.recorder.events, dict[int, int]()
    for storage, size, _ in events[:traced.first]:
        if storage.category != HOST:
            before[id(storage)] = before.get(id(storage), 0) + size
    yield from ((which, size) for which, size in before.items() if size)
    for turn in (0, 1):
        for storage, size, _ in events[traced.first:]:
            if storage.category != HOST:
                yield (id(storage) if turn == 0 else -id(storage)), size


def peaks_of(recorder: Recorder, first: int) -> dict[Place, Peak]:
    """Where each place holds the most, from the event `first` on."""
    now: dict[str, int] = defaultdict(int)
    total, most = 0, dict[Place, int]()
    found: dict[Place, Peak] = {}
    for number, (storage, size, moment) in enumerate(recorder.events):
        if storage.category == HOST:
            continue
        now[storage.category] += size
        total += size
        place = moment.phase, moment.micro_batch, moment.part, moment.region
        if number >= first and total > most.get(place, 0):
            most[place] = total
            found[place] = Peak(dict(now), moment)
    return found
