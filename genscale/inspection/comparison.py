"""Where two runs part: the first step at which they differ, and in what; and whether rounding explains it."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.inspection.checkpoint_comparison import CheckpointDifference, compare_checkpoints
from genscale.reading import Unreadable, read_yaml
from genscale.settings.config import MAY_CHANGE_AT_RESUME, MUST_NOT_CHANGE_AT_RESUME
from genscale.supervise.run_folder import flatten
from genscale.tracking.metrics_file import read_metrics
from genscale.training.trace import NAME as TRACE

METRICS = "metrics.jsonl"
PLACES = ("run.name", "run.dir", "run.resume", "run.trace")
"""Settings that say where a run lies and what is kept of it, not what it is."""
ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2, "fp8": 1e-1}
"""Largest relative difference of a loss or a gradient that the order of sums explains, by precision."""
DIFFERENCE_OF = {"divergence": "entropy"}
"""Numbers that are small differences of large ones, and what is as large as these: their rounding is that of the large ones."""
NO_TOKEN = -1
"""What stands in the trace where a text has ended."""
ROUNDING_OF_UPDATES = 1e-6
"""The same of weights after equal gradients: updates are made in fp32 at every precision."""
Records = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Difference:
    """What is not equal in a step.

    Attributes:
        what: in words, with both values where they are numbers.
        size: relative; None of what is either equal or another run (samples, draws, learning rates).
        limit: the size that rounding explains.
        is_loss: of a number that was logged.
    """

    step: int
    what: str
    size: float | None = None
    limit: float = 0.0
    is_loss: bool = False

    @property
    def may_be_rounding(self) -> bool:
        return self.size is not None and self.size <= self.limit


@dataclass
class Comparison:
    """What two runs have in common and what not.

    Attributes:
        config: settings that differ, with both values.
        source: the file that was compared step by step.
        compared: steps that both have on record.
        first: the first difference of all; all: everything that differs in the same step.
        beyond: the first that rounding does not explain.
        equal_at: the last step before the first difference that both have on record, if there is one.
        largest: relative difference of a logged number, over all steps.
        ends: last step on record of each.
    """

    config: dict[str, tuple[Any, Any]]
    source: str
    compared: int
    ends: tuple[int, int]
    checkpoints: list[int] = field(default_factory=list)
    checkpoint: CheckpointDifference | None = None
    first: Difference | None = None
    beyond: Difference | None = None
    all: list[Difference] = field(default_factory=list)
    equal_at: int | None = None
    largest: float = 0.0

    @property
    def alike(self) -> bool:
        """Equal, or equal but for rounding."""
        return self.beyond is None and (self.checkpoint is None or self.first is not None)

    @property
    def verdict(self) -> str:
        """In one line."""
        tail = ""
        if self.config:
            names = [f"{key} {a} and {b}" for key, (a, b) in self.config.items()]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            tail = f"; settings that differ: {', '.join(names[:3])}{more}"
        if self.first is None and self.checkpoint is not None:
            return f"first difference in the checkpoints of step {self.checkpoint.step}: {self.checkpoint}{tail}"
        if self.first is None:
            on = f"; one run goes on to step {max(self.ends)}" if self.ends[0] != self.ends[1] else ""
            return f"equal for {self.compared} step{'s' if self.compared != 1 else ''}{on}{tail}"
        if self.beyond is None:
            return (f"equal but for rounding: from step {self.first.step} on ({self.first.what}); largest relative difference "
                    f"of a logged number {self.largest:.1e} over {self.compared} steps{tail}")
        if self.beyond is not self.first:
            return (f"first difference beyond rounding at step {self.beyond.step}: {self.beyond.what}; rounding from step "
                    f"{self.first.step} on ({self.first.what}){tail}")
        gap = self.equal_at is not None and self.equal_at < self.first.step - 1
        since = f" (equal at step {self.equal_at}; no step between is on record)" if gap else ""
        return f"first difference at step {self.first.step}: {self.first.what}{since}{tail}"


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare two run folders: settings, then every step of their traces (or of metrics.jsonl), then checkpoints.

    Raises:
        UserError: one is no run, they are runs of different families, or they have no step in common.
    """
    configs = [_config(a), _config(b)]
    families = [config["model"]["family"] for config in configs]
    if families[0] != families[1]:
        raise UserError(f"compare: {a} is a run of family {families[0]} and {b} of {families[1]}; nearest allowed: two runs "
                        "of one family")
    flat = [flatten(config) for config in configs]
    changed = {key: (flat[0].get(key), flat[1].get(key)) for key in sorted(flat[0].keys() | flat[1].keys())
               if key not in PLACES and flat[0].get(key) != flat[1].get(key)}
    traced = all((folder / TRACE).is_file() for folder in (a, b))
    source = TRACE if traced else METRICS
    records = [_records(folder, source) for folder in (a, b)]
    steps = sorted(records[0].keys() & records[1].keys())
    if not steps:
        raise UserError(f"compare: {a} and {b} have no step in common in {source}: steps {_span(records[0])} and "
                        f"{_span(records[1])}")
    limit = ROUNDING.get(configs[0]["train"]["precision"], ROUNDING["fp32"])
    comparison = Comparison(changed, source, len([step for step in steps if step > 0]), (max(records[0]), max(records[1])))
    # A setting that changes what is computed may change it little: that is not rounding. (One that a run does not have at all
    # is younger than the run, and its default is what there was before.)
    same_run = not any(key in MUST_NOT_CHANGE_AT_RESUME or not key.startswith(MAY_CHANGE_AT_RESUME) for key in changed
                       if all(key in settings for settings in flat))
    _find(comparison, records, steps, limit, same_run)
    comparison.checkpoints, comparison.checkpoint = compare_checkpoints(a / "checkpoints", b / "checkpoints")
    return comparison


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_yaml(folder / "config.yaml")
        named = config["model"]["family"], config["train"]["precision"]
    except Unreadable as error:
        raise UserError(f"compare: {folder / 'config.yaml'} {error}") from None
    except (OSError, KeyError, TypeError):
        named = None, None
    if not all(isinstance(word, str) for word in named):
        raise UserError(f"compare: {folder} is no run folder (which holds config.yaml and metrics.jsonl)")
    return config


def _records(folder: Path, source: str) -> Records:
    """By step; a step's losses and its evaluation stand in one."""
    records: Records = {}
    for record in read_metrics(folder / source):
        if wrong := _malformed(record, source == TRACE):
            raise UserError(f"compare: {folder / source}: {wrong} of step {record['step']} is not what genscale writes there")
        records.setdefault(record["step"], {}).update(record)
    if not records:
        raise UserError(f"compare: {folder} has no step in {source}; compare runs that trained")
    return records


def _malformed(record: dict[str, Any], is_trace: bool) -> str | None:
    """What in the record of a step nothing can be compared with."""
    if not is_trace:
        return None
    if not isinstance(record.get("metrics", {}), dict):
        return "metrics"
    made = record.get("made", {})
    if not (isinstance(made, dict) and all(isinstance(samples, dict) and all(map(_is_made, samples.items()))
                                           for samples in made.values())):
        return "made"
    for kind in ("gradients", "weights"):
        networks = record.get(kind, {})
        if not isinstance(networks, dict) or not all(isinstance(tensors, dict) for tensors in networks.values()):
            return kind
        for name, values in ((name, values) for tensors in networks.values() for name, values in tensors.items()):
            if not isinstance(values, list) or len(values) != 3 or not all(
                    value is None or _is_number(value) for value in values[1:]):
                return f"{kind} {name}"
    return None


def _is_made(sample: tuple[str, Any]) -> bool:
    """Whether it is the number of a sample, and lists of tokens."""
    return sample[0].isascii() and sample[0].isdigit() and isinstance(sample[1], list) and all(
        isinstance(text, list) and all(type(token) is int for token in text) for text in sample[1])


def _is_number(value: Any) -> bool:
    """Whether it is a number, of a size that a float can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _span(records: Records) -> str:
    return f"{min(records)} to {max(records)}"


def _find(comparison: Comparison, records: list[Records], steps: list[int], limit: float, same_run: bool) -> None:
    """Fill in where the runs part. Once rounding has parted them, weights and gradients say no more (AdamW makes much of the
    last bit of a small gradient): what counts then are other samples, draws and learning rates, and losses."""
    scales = _scales(records)
    for step in steps:
        pair = records[0][step], records[1][step]
        found = list(_in_step(step, *pair, limit, scales))
        comparison.largest = max([comparison.largest, *(each.size for each in found if each.is_loss and each.size is not None)])
        for each in found:
            comparison.first = comparison.first or each
            parted_before = comparison.first is not each
            explained = each.may_be_rounding or (parted_before and each.size is not None and not each.is_loss)
            if comparison.beyond is None and not (same_run and explained):
                comparison.beyond = each
        if comparison.first is None:
            comparison.equal_at = step
        elif comparison.first.step == step:
            comparison.all = found


def _scales(records: list[Records]) -> dict[str, float]:
    """The usual size of each logged number: what crosses zero differs by much there, relative to itself."""
    values: dict[str, list[float]] = {}
    for record in (*records[0].values(), *records[1].values()):
        for name, value in _metrics(record).items():
            if _is_number(value):
                values.setdefault(name, []).append(abs(value))
    scales = {name: statistics.median(sizes) for name, sizes in values.items()}
    return {name: max(size, scales.get(DIFFERENCE_OF.get(name, ""), 0.0)) for name, size in scales.items()}


def _metrics(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("metrics", {}) if "weights" in record else record


def _in_step(step: int, a: dict[str, Any], b: dict[str, Any], limit: float, scales: dict[str, float]) -> Iterator[Difference]:
    """In the order in which a step comes to them."""
    numbers = [_metrics(a), _metrics(b)]
    names = [name for name in numbers[0] if name in numbers[1] and numbers[0][name] != numbers[1][name]]
    if any(a.get(key) != b.get(key) for key in ("batch", "data_digest")) and ("batch" in a or "data_digest" in a):
        yield Difference(step, "batch (sample order or content)")
    if a.get("draws") != b.get("draws"):
        yield Difference(step, "draws (noise, dropout)")
    yield from _made(step, a.get("made", {}), b.get("made", {}))
    norms = [name for name in names if name.endswith("grad_norm")]
    rates = [name for name in names if name.startswith("learning_rate")]
    for name in names:
        if name not in norms + rates and not _of_the_clock(name):
            yield _number(step, name, numbers, limit, scales)
    yield from _networks(step, "gradients", a, b, limit)
    for name in norms:
        yield _number(step, name, numbers, limit, scales)
    for name in rates:
        yield Difference(step, f"{name.replace('_', ' ').replace('/', ' of ')} {_shown(numbers[0][name])} and "
                               f"{_shown(numbers[1][name])}")
    yield from _networks(step, "weights", a, b, ROUNDING_OF_UPDATES)


def _made(step: int, a: dict[str, Any], b: dict[str, Any]) -> Iterator[Difference]:
    """The first token that is another one, where what was made is on record: from there on the runs see other texts."""
    for name in sorted(a.keys() & b.keys()):
        for sample in sorted(a[name].keys() & b[name].keys(), key=int):
            for answer, pair in enumerate(zip(a[name][sample], b[name][sample], strict=False)):
                texts = [[token for token in text if token != NO_TOKEN] for text in pair]
                for place, tokens in enumerate(zip_longest(*texts)):
                    if tokens[0] != tokens[1]:
                        shown = " and ".join("none" if token is None else str(token) for token in tokens)
                        yield Difference(step, f"sample {int(sample):,}, answer {answer}, token {place}: {shown} ({name})")
                        return


def _of_the_clock(name: str) -> bool:
    """Speed, waiting, repeated reads: they differ between equal runs."""
    return name in ("step", "data_digest", "mfu", "retries") or name.endswith(("_seconds", "_per_second", "_share"))


def _number(step: int, name: str, numbers: list[dict[str, Any]], limit: float, scales: dict[str, float]) -> Difference:
    a, b = (pair[name] for pair in numbers)
    if not (_is_number(a) and _is_number(b)):  # null: NaN or infinite
        return Difference(step, f"{name} {_shown(a)} and {_shown(b)}", math.inf, limit, is_loss=True)
    size = abs(a - b) / max(abs(a), abs(b), scales[name])
    return Difference(step, f"{name} {a:.9g} and {b:.9g}, relative difference {size:.1e}", size, limit, is_loss=True)


def _shown(value: Any) -> str:
    return f"{value:.9g}" if _is_number(value) else "null" if value is None else repr(str(value)[:40])


def _networks(step: int, kind: str, a: dict[str, Any], b: dict[str, Any], limit: float) -> Iterator[Difference]:
    """Networks whose gradients or weights differ, with the tensor that differs most."""
    of_a, of_b = a.get(kind, {}), b.get(kind, {})
    for network in sorted(of_a.keys() | of_b.keys(), key=list({**of_a, **of_b}).index):
        one, other = of_a.get(network, {}), of_b.get(network, {})
        title = f"{'initial ' if step == 0 else ''}{kind} of {network}"
        if one.keys() != other.keys():
            yield Difference(step, f"{title}: tensors of other names")
            continue
        changed = {name: _apart(one[name], other[name]) for name in one if one[name][0] != other[name][0]}
        if not changed:
            continue
        most = max(changed, key=lambda name: changed[name])
        norm = math.hypot(*(values[1] or 0.0 for values in one.values()))
        size = math.hypot(*changed.values()) / norm if norm else math.inf
        which = f"tensor {most}" if len(changed) == 1 else f"{len(changed)} of {len(one)} tensors, most {most}"
        # Initial weights are drawn, not computed.
        yield Difference(step, f"{title}: {which}, relative difference {size:.1e}", None if step == 0 else size, limit)


def _apart(a: list[Any], b: list[Any]) -> float:
    """How far apart two tensors are, by their projections."""
    return math.inf if a[2] is None or b[2] is None else abs(a[2] - b[2])
