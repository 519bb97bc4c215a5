"""What one step of a run does, as it is planned: written by the tracer, read by the clock, the chooser and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Certainty = Literal["exact", "traced", "replayed", "modelled", "assumed"]
"""How a number came about: a closed form that is tested to the byte; the step itself on tensors without storage; a model of the
caching allocator fed with the trace; a model of a library's code, or one with measured constants; nothing but experience."""
Part = Literal["forward", "recomputation", "backward", "optimizer", "average"]
TimeCategory = Literal["matrix products", "attention", "convolutions", "recomputation", "head and loss", "elementwise",
                       "optimizer", "waiting for the network", "launches"]
Category = Literal["weights", "gathered weights", "gradients", "exchange of gradients", "optimizer state", "averages",
                   "activations", "logits and loss", "other", "caching allocator", "CUDA and NCCL"]
Kind = Literal["product", "attention", "convolution", "elementwise", "other"]


@dataclass(frozen=True)
class Machine:
    """The devices that a run is planned for.

    Attributes:
        gpu: name of the profile (`genscale.planning.profiles`).
        gpus: in all.
        gpus_per_node: processes of one node, of one device each.
        between_nodes: bytes a second of one node's network cards together, in one direction; None: as the profile has it.
    """

    gpu: str
    gpus: int
    gpus_per_node: int
    between_nodes: float | None = None


@dataclass(frozen=True)
class Operation:
    """One kind of kernel call of one rank, with how often a step makes it.

    Attributes:
        name: torch's name, `aten.mm`.
        kind: what bounds it.
        phase: of the objective.
        part: of the phase's update.
        head: whether it belongs to the logits and the loss.
        shape: of a product `(rows, columns, inner)`, batched ones with the batch first; of attention `(batch, heads, queries,
            keys, head width)`; of a convolution `(batch, in, out, *output size, *kernel)`; else the shape of the result.
        dtype: of the arguments, `bfloat16`.
        flops: of one call; a multiplication and an addition are two.
        bytes: read and written by one call.
        count: calls in a step (micro-batches, layers and repeats of the phase included); of a phase that comes every n steps,
            an n-th.
    """

    name: str
    kind: Kind
    phase: str
    part: Part
    head: bool
    shape: tuple[int, ...]
    dtype: str
    flops: float
    bytes: int
    count: float


@dataclass(frozen=True)
class Exchange:
    """A collective of one rank, with how often a step makes it.

    Attributes:
        name: which one.
        bytes: of the whole (what an all-gather or a broadcast gives, what a reduce-scatter takes, what an
            all-to-all takes and gives).
        ranks: how many take part.
        within_nodes: whether all of them stand in one node.
        hidden: whether computation goes on meanwhile.
        count: calls in a step.
        last_only: made in the last micro-batch alone, whose computation is all that goes on meanwhile.
    """

    name: Literal["all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all"]
    phase: str
    part: Part
    bytes: int
    ranks: int
    within_nodes: bool
    hidden: bool
    count: float
    last_only: bool = False


@dataclass(frozen=True)
class MemoryPart:
    """Bytes of one rank at the moment of the peak."""

    category: Category
    bytes: int
    certainty: Certainty


@dataclass(frozen=True)
class PlannedMemory:
    """Peak of one rank.

    Attributes:
        parts: which add up to the peak.
        at_rest: bytes of weights, optimizer state and averages of one rank between steps, in closed form.
        phase, part, layer: the moment of the peak; layer is the dotted name of the module, or "".
        checkpoint_bytes: of a whole checkpoint, of all ranks together.
        host: the most bytes of one rank in host memory, of what is offloaded.
    """

    parts: tuple[MemoryPart, ...]
    at_rest: int
    phase: str
    part: Part
    layer: str
    checkpoint_bytes: int
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class PlannedStep:
    """All that one rank does in a step.

    Attributes:
        parameters: of all networks, unsharded.
        samples: of a step, all ranks together.
        tokens: of a step, all ranks together; None where samples are no texts.
        micro_batch_size, accumulation: as they follow from the config and the number of devices.
    """

    parameters: int
    samples: int
    tokens: int | None
    micro_batch_size: int
    accumulation: int
    memory: PlannedMemory
    operations: tuple[Operation, ...] = field(repr=False)
    exchanges: tuple[Exchange, ...] = field(repr=False)


@dataclass(frozen=True)
class TimePart:
    """Seconds of a step of one rank; the parts add up to the step."""

    category: TimeCategory
    seconds: float


@dataclass(frozen=True)
class PlannedTime:
    """Attributes:
        parts: of one step, longest first.
        spread: relative error that nine in ten predictions keep (0.2: 20 %).
        model_flops: of a step, all ranks together, without recomputation: what MFU counts.
        mfu: None where the profile knows no peak at the precision.
    """

    parts: tuple[TimePart, ...]
    spread: float
    model_flops: float
    mfu: float | None

    @property
    def step(self) -> float:
        return sum(part.seconds for part in self.parts)
