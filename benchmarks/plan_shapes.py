"""A published GPT run as the step that the clock of `genscale plan` reads: its operations and exchanges, in closed form.

Others' code is not here to be traced, so its blocks are written down: two products of attention's ends, two or three of the
MLP, attention, and the bytes that elementwise operations move, in units of the residual stream. A test holds products and
attention against those that are traced in genscale's own GPT.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from genscale.planning.account import Exchange, Machine, Operation, Part, PlannedMemory, PlannedStep
from genscale.planning.profiles import GpuProfile, profile

FP8, BF16, FP32 = 1, 2, 4
SMALL = 20
"""Elementwise operations of a block in one direction: what the host has to launch."""
RECOMPUTED = {"full": 1.0, "selective-op": 0.45, "selective-layer-2": 0.5, "selective (share not stated)": 0.5}
"""Share of a block's products that are computed again (where it is not told, the middle between none and all); of any other
selective checkpointing none, but what is elementwise."""
WHOLE = ("full", "selective-layer-2", "selective (share not stated)")
"""Where attention is computed again as well: whole blocks are."""
NO_MEMORY = PlannedMemory(parts=(), at_rest=0, phase="", part="forward", layer="", checkpoint_bytes=0)


def machine_of(row: dict[str, Any]) -> Machine:
    gigabits = row.get("inter_gbps")
    return Machine(row["gpu"], row["gpus"], min(row["gpus"], row["gpus_per_node"]), gigabits * 1e9 / 8 if gigabits else None)


def profile_of(row: dict[str, Any]) -> GpuProfile:
    if row["gpu"] == "h100_500w":  # a cloud's own build: 96 GB of slower memory, and less power
        return replace(profile("h100"), memory_bandwidth=2.4e12)
    return profile({("a100", 40): "a100-40"}.get((row["gpu"], row["gpu_mem_gib"]), row["gpu"]))


def compiled(row: dict[str, Any]) -> bool:
    """Whether something fuses elementwise operations: torch.compile, or kernels written by hand."""
    return row.get("compile") not in (False, None, "eager")


def parameters_of(row: dict[str, Any]) -> int:
    m = row["model"]
    query, shared = m["heads"] * m["head_width"], m["kv_heads"] * m["head_width"]
    block = m["width"] * (2 * query + 2 * shared) + m["width"] * m["mlp_width"] * (3 if m["activation"] == "swiglu" else 2)
    return m["layers"] * block + m["vocab"] * m["width"] * (1 if m["tied"] else 2)


def step_of(row: dict[str, Any]) -> PlannedStep:
    """What one rank does in a step of a published run."""
    accumulation = row.get("accumulation") or 1
    samples = row["micro_batch"] * accumulation * row["gpus"]
    operations = Operations(row, accumulation)
    return PlannedStep(parameters_of(row), samples, samples * row["seq"], row["micro_batch"], accumulation, NO_MEMORY,
                       tuple(operations.all()), tuple(exchanges_of(row, accumulation)))


@dataclass
class Operations:
    """Of one rank in a step.

    Args:
        row: a published run.
        accumulation: micro-batches of a step.
    """

    row: dict[str, Any]
    accumulation: int
    made: list[Operation] = field(default_factory=list)

    def all(self) -> list[Operation]:
        m, b, time = self.row["model"], self.row["micro_batch"], self.row["seq"]
        tokens, width, layers = b * time, m["width"], m["layers"]
        query, shared = m["heads"] * m["head_width"], m["kv_heads"] * m["head_width"]
        wide = [(width, m["mlp_width"])] * (2 if m["activation"] == "swiglu" else 1)
        linear = [(width, query + 2 * shared), (query, width), *wide, (m["mlp_width"], width)]
        again = self.row["checkpointing"]
        share = next((part for name, part in RECOMPUTED.items() if again.startswith(name)), 0.0)
        attention = (b, m["heads"], time, time, m["head_width"])
        whole = share if again.startswith(WHOLE) else 0.0
        for into, out in linear:
            self.product(tokens, out, into, "forward", layers)
            self.product(tokens, out, into, "recomputation", layers * share)
            self.product(tokens, into, out, "backward", layers)
            self.product(into, out, tokens, "backward", layers)
        for part, count, products in (("forward", layers, 2), ("recomputation", layers * whole, 2), ("backward", layers, 5)):
            self.attention(attention, products, part, count)
        forward, backward = self.elementwise_units()
        for part, units, count in (("forward", forward, layers), ("backward", backward, layers),
                                   ("recomputation", forward, layers * (whole or (again != "none")))):
            self.elementwise(int(units * tokens * width * BF16), part, count)
        self.head(tokens, width, m["vocab"])
        self.optimizer()
        return [operation for operation in self.made if operation.count]

    def elementwise_units(self) -> tuple[float, float]:
        """Bytes that the elementwise operations of a block move, forward and backward, by those of the residual stream."""
        m = self.row["model"]
        widening, gated, rotary = m["mlp_width"] / m["width"], m["activation"] == "swiglu", m["positions"] == "rotary"
        forward = 10 + 3 * rotary + widening * (3 if gated else 2) + 2 * bool(m.get("bias"))
        backward = 14 + 3 * rotary + widening * (5 if gated else 3) + 4 * bool(m.get("bias"))
        if m["norm"] == "rmsnorm":  # in fp32, several passes, where nothing fuses them
            forward, backward = forward + 12, backward + 20
        if rotary:  # in fp32, on complex numbers
            forward, backward = forward + 8, backward + 8
        return forward, backward

    def head(self, tokens: int, width: int, vocab: int) -> None:
        self.product(tokens, vocab, width, "forward", 1, head=True)
        self.product(tokens, width, vocab, "backward", 1, head=True)
        self.product(width, vocab, tokens, "backward", 1, head=True)
        # The logits in bf16 and in fp32, and their gradients; where the loss is compiled, read and written once in bf16.
        moved = 4 if compiled(self.row) else 10
        for part in ("forward", "backward"):
            self.add(Operation("loss", "elementwise", "", part, True, (tokens, vocab), "float32", 0, moved * tokens * vocab,
                               self.accumulation))

    def optimizer(self) -> None:
        sharded = self.row["strategy"].startswith("zero") or self.row["strategy"] == "fsdp2"
        local = parameters_of(self.row) // (self.row["gpus"] if sharded else 1)
        # Weight and two moments, read and written; the gradient, twice; the clipping's pass; the copy to compute with.
        moved = local * (9 * BF16 if self.row["precision"] == "bf16-pure" else 9 * FP32 + BF16)
        self.add(Operation("adamw", "elementwise", "", "optimizer", False, (local,), "float32", 0, moved, 1))

    def product(self, rows: int, columns: int, inner: int, part: Part, count: float, head: bool = False) -> None:
        self.add(Operation("aten.mm", "product", "", part, head, (rows, columns, inner), "bfloat16", 2 * rows * columns * inner,
                           BF16 * (rows * columns + rows * inner + inner * columns), count * self.accumulation))

    def attention(self, shape: tuple[int, ...], products: int, part: Part, count: float) -> None:
        batch, heads, queries, keys, width = shape
        flops = products * 2 * batch * heads * queries * keys * width
        self.add(Operation("attention", "attention", "", part, False, shape, "bfloat16", flops,
                           4 * BF16 * batch * heads * queries * width, count * self.accumulation))

    def elementwise(self, size: int, part: Part, count: float) -> None:
        self.add(Operation("elementwise", "elementwise", "", part, False, (size // BF16,), "bfloat16", 0, size // SMALL,
                           SMALL * count * self.accumulation))

    def add(self, operation: Operation) -> None:
        self.made.append(operation)


def exchanges_of(row: dict[str, Any], accumulation: int) -> list[Exchange]:
    """Of one rank in a step: weights gathered block by block and gradients spread, or gradients summed at its end."""
    ranks = row["gpus"]
    if ranks == 1:
        return []
    parameters, blocks = parameters_of(row), row["model"]["layers"] + 1
    within = ranks <= row["gpus_per_node"]
    reduced = FP32 if str(row.get("reduce_dtype")).startswith("fp32") else BF16
    gathered = FP8 if "float8 all-gather" in row.get("stack", "") else BF16

    def exchange(name: Any, part: Part, size: int, count: int, hidden: bool = True, last: bool = False) -> Exchange:
        return Exchange(name, "", part, parameters * size // blocks, ranks, within, hidden, blocks * count, last)

    if row["strategy"] in ("zero3", "fsdp2", "zero2"):  # zero2: FSDP keeps the weights gathered between forward and backward
        gathers = [] if row["strategy"] == "zero2" else [exchange("all_gather", "backward", gathered, accumulation)]
        return [exchange("all_gather", "forward", gathered, accumulation), *gathers,
                exchange("reduce_scatter", "backward", reduced, accumulation)]
    if row["strategy"] == "zero1":
        return [exchange("reduce_scatter", "backward", reduced, 1, last=True),
                exchange("all_gather", "optimizer", BF16, 1, hidden=False)]
    return [exchange("all_reduce", "backward", reduced, 1, last=True)]
