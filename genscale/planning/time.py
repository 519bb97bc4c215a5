"""The clock of a plan: how long a step takes, from what it does and what the device can do.

Each operation takes as long as its arithmetic or its memory traffic, whichever is longer (the roofline); a collective takes its
data over the slowest link of its ring, and a latency. Five constants a kind of device, fitted or measured, say what shares of
the data sheet are reached (`genscale.planning.profiles`); everything else here is a shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from genscale.planning.account import Exchange, Machine, Operation, PlannedStep, PlannedTime, TimeCategory, TimePart
from genscale.planning.profiles import GpuProfile
from genscale.tracking.peaks import peak_flops

TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.75))
"""Rows and columns that a multiprocessor computes at a time, and how well it does, the largest being the best."""
HEAD_WIDTHS = ((128, 1.0), (96, 0.95), (0, 0.87))
"""Attention by the width of its heads: from so many on, so well."""
CAUSAL = 0.5
"""Share of the square of queries and keys that kernels compute: what is masked they skip."""
WARM_UP_KEYS = {"cpu": 64}
"""Keys over which attention reaches half its rate, where it is not 256 as on a GPU."""
FP8_SHARE = 0.9
"""Products in fp8 reach less of their peak, for what they multiply is scaled before."""
FUSABLE = ("elementwise", "other")
FUSED_BYTES, FUSED_LAUNCHES = 0.3, 0.3
"""What torch.compile leaves of the memory traffic, and of the launches, of a block's elementwise operations."""
OVERLAP = 0.85
"""Share of a stretch of computation that exchanges can hide behind."""
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
CATEGORIES: dict[str, TimeCategory] = {"product": "matrix products", "attention": "attention", "convolution": "convolutions"}
UNJUDGED = 0.4
"""Spread where most of the time goes into what no published run judges: convolutions, elementwise work, launches."""


@dataclass
class Stretch:
    """What one phase does in one direction, which its exchanges may hide behind."""

    device: float = 0.0
    launches: float = 0.0
    hidden: float = 0.0
    hidden_last: float = 0.0
    shown: float = 0.0


def time_of(step: PlannedStep, machine: Machine, profile: GpuProfile, precision: str, compiled: bool) -> PlannedTime:
    """How long a step takes, by part.

    Args:
        step: what one rank does.
        precision: of the run, `train.precision`, with auto resolved.
        compiled: whether `parallel.compile` is set.

    Raises:
        UserError: the device does not compute in the precision.
    """
    profile.peak(precision)
    parts: dict[TimeCategory, float] = defaultdict(float)
    stretches: dict[tuple[str, str], Stretch] = defaultdict(Stretch)
    for operation in step.operations:
        fused = compiled and not operation.head and operation.kind in FUSABLE and operation.part not in ("optimizer", "average")
        seconds = operation.count * seconds_of(operation, profile, precision) * (FUSED_BYTES if fused else 1)
        parts[_category(operation)] += seconds
        stretch = stretches[operation.phase, _direction(operation.part)]
        stretch.device += seconds
        stretch.launches += operation.count * profile.launch * (FUSED_LAUNCHES if fused else 1)
    for exchange in step.exchanges:
        seconds = exchange.count * exchange_seconds(exchange, machine, profile)
        stretch = stretches[exchange.phase, _direction(exchange.part)]
        if not exchange.hidden:
            stretch.shown += seconds
        elif exchange.last_only:
            stretch.hidden_last += seconds
        else:
            stretch.hidden += seconds
    for stretch in stretches.values():
        # A GPU works off a queue that the host fills ahead; on the CPU, host and device are one.
        idle = stretch.launches if profile.device == "cpu" else max(0.0, stretch.launches - stretch.device)
        parts["launches"] += idle
        parts["waiting for the network"] += _waiting(stretch, stretch.device + idle, step.accumulation, profile.exposed)
    flops = model_flops(step.operations) * machine.gpus
    peak = peak_flops(profile.device, precision)
    seconds = sum(parts.values())
    mfu = flops / (seconds * machine.gpus * peak) if peak and seconds else None
    listed = sorted((TimePart(category, time) for category, time in parts.items() if time), key=lambda part: -part.seconds)
    return PlannedTime(tuple(listed), _spread(parts, profile), flops, mfu)


def seconds_of(operation: Operation, profile: GpuProfile, precision: str) -> float:
    """One call of an operation on an idle device: the longer of its arithmetic and its memory traffic."""
    traffic = operation.bytes / (profile.memory_bandwidth * profile.memory)
    if operation.kind in ("elementwise", "other") or not operation.flops:
        return traffic
    arithmetic = PRECISIONS.get(operation.dtype, "fp32")
    if precision == "fp8" and operation.kind == "product" and not operation.head and arithmetic == "bf16":
        arithmetic = "fp8"
    flops = operation.flops
    if operation.kind == "attention":
        share, flops = profile.attention * attention_share(operation.shape, profile), flops * CAUSAL
    else:
        batch, rows, columns, inner = _as_product(operation)
        share = profile.product * product_share(batch, rows, columns, inner, profile)
        share *= FP8_SHARE if arithmetic == "fp8" else 1
        share *= profile.convolution if operation.kind == "convolution" else 1
    return max(flops / (profile.peak(arithmetic) * share), traffic)


def product_share(batch: int, rows: int, columns: int, inner: int, profile: GpuProfile) -> float:
    """Speed of a product `(batch, rows, inner) x (batch, inner, columns)` by that of a very large one, in (0, 1].

    The last wave of tiles does not fill the device, the tiles at the edges are not full; half of that is lost, as neighbouring
    kernels overlap. Short inner sizes, and narrow results, keep the multiprocessors waiting.
    """
    filled = 1.0 if profile.device == "cpu" else max(
        share * _filled(batch, rows, columns, high, wide, profile.multiprocessors) for high, wide, share in TILES)
    narrow = min(rows, columns)
    return filled**0.5 * inner / (inner + profile.half) * narrow / (narrow + profile.half / 2)


def _filled(batch: int, rows: int, columns: int, tile_rows: int, tile_columns: int, multiprocessors: int) -> float:
    tiles = batch * math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns)
    waves = math.ceil(tiles / multiprocessors)
    return batch * rows * columns / (waves * multiprocessors * tile_rows * tile_columns)


def _as_product(operation: Operation) -> tuple[int, int, int, int]:
    """(batch, rows, columns, inner) of a product, or of a convolution as the product that it is."""
    if operation.kind == "product":
        *stack, rows, columns, inner = operation.shape
        return math.prod(stack), rows, columns, inner
    batch, into, out, *rest = operation.shape
    size, kernel = rest[:len(rest) // 2], rest[len(rest) // 2:]
    return 1, batch * math.prod(size), out, into * math.prod(kernel)


def attention_share(shape: tuple[int, ...], profile: GpuProfile) -> float:
    """Speed of attention `(batch, heads, queries, keys, head width)` by that over long texts with wide heads, in (0, 1]."""
    *_, keys, width = shape
    long = keys / (keys + WARM_UP_KEYS.get(profile.device, 256))
    return long if profile.device == "cpu" else long * next(share for least, share in HEAD_WIDTHS if width >= least)


def exchange_seconds(exchange: Exchange, machine: Machine, profile: GpuProfile) -> float:
    """One collective, by itself: what each rank of a ring passes on over the slowest link, and the latency.

    All data enter every node once, over its network cards together; groups that stand side by side in a node share them. An
    all-reduce is a reduce-scatter and an all-gather; what is broadcast goes along the ring in pieces, all of it over each link.
    """
    if exchange.ranks < 2:
        return 0.0
    rate = profile.link * profile.link_share
    if not exchange.within_nodes:
        # Ranks of the group in one node: all of it where the group is everybody, one where it has one of each node.
        inside = min(max(1, exchange.ranks * machine.gpus_per_node // machine.gpus), machine.gpus_per_node)
        beside = machine.gpus_per_node / inside
        network = machine.between_nodes or profile.between_nodes
        rate = min(rate, network * profile.network_share / beside)
    rounds = 2 if exchange.name == "all_reduce" else 1
    passed_on = exchange.bytes * (1 if exchange.name == "broadcast" else (exchange.ranks - 1) / exchange.ranks)
    return rounds * (passed_on / rate + profile.latency * math.log2(exchange.ranks))


def _waiting(stretch: Stretch, computing: float, accumulation: int, exposed: float) -> float:
    """Seconds that a stretch is longer for its exchanges."""
    def behind(exchanges: float, work: float) -> float:
        return max(exposed * exchanges, exchanges - OVERLAP * work)

    return stretch.shown + behind(stretch.hidden, computing) + behind(stretch.hidden_last, computing / accumulation)


def model_flops(operations: Iterable[Operation]) -> float:
    """FLOPs of one rank as MFU counts them: products and convolutions of forward and backward; of attention the full square,
    twice as much backward as forward (as `GPT.flops_per_token`); nothing that is computed again."""
    flops = 0.0
    for operation in operations:
        if operation.kind == "attention" and operation.part == "forward":
            batch, heads, queries, keys, width = operation.shape
            flops += 3 * 4 * batch * heads * queries * keys * width * operation.count
        elif operation.kind in ("product", "convolution") and operation.part in ("forward", "backward"):
            flops += operation.flops * operation.count
    return flops


def _direction(part: str) -> str:
    return {"recomputation": "backward", "average": "optimizer"}.get(part, part)


def _category(operation: Operation) -> TimeCategory:
    if operation.part in ("optimizer", "average"):
        return "optimizer"
    if operation.part == "recomputation":
        return "recomputation"
    if operation.head:
        return "head and loss"
    return CATEGORIES.get(operation.kind, "elementwise")


def _spread(parts: dict[TimeCategory, float], profile: GpuProfile) -> float:
    judged = parts["matrix products"] + parts["attention"] + parts["recomputation"] + parts["head and loss"]
    unjudged = parts["convolutions"] + parts["elementwise"] + parts["launches"]
    return profile.spread if judged >= unjudged else max(profile.spread, UNJUDGED)
