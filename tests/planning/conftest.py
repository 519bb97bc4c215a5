"""Planned steps made by hand: closed forms of a GPT that are easy to check, in the place of the tracer and the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import genscale
from genscale.planning.account import (
    Exchange,
    Machine,
    MemoryPart,
    Operation,
    PlannedMemory,
    PlannedStep,
    PlannedTime,
    TimePart,
)
from genscale.planning.plan import Plan, Terms, settled
from genscale.planning.profiles import profile
from genscale.settings.config import Config
from genscale.training.setup import derive_accumulation

GIB = 2**30
PARAMETERS = 8 * 10**9
SHARDED = {"single": (), "ddp": (), "zero1": ("optimizer",), "zero2": ("optimizer", "gradients"),
           "zero3": ("optimizer", "gradients", "weights"), "fsdp2": ("optimizer", "gradients", "weights")}
KEPT = {"none": 24.0, "selective": 16.0, "full": 4.0}
"""GiB of activations a sample."""
TIME = {"none": 1.0, "selective": 1.1, "full": 1.3}


def llama(**parallel: object) -> Config:
    """configs/gpt/llama-8b.yaml with other settings of `parallel`."""
    return genscale.config("gpt/llama-8b", {f"parallel.{name}": value for name, value in parallel.items()})


def hand_made(config: Config, machine: Machine, terms: Terms | None = None) -> Plan:
    """16 bytes a parameter, each quarter of them sharded as the strategy has it; activations by the sample."""
    gpu = profile(machine.gpu)
    config = settled(config, machine, gpu)
    micro, accumulation = derive_accumulation(config.train, machine.gpus)
    group = config.parallel.shard_size if config.parallel.strategy == "fsdp2" else None
    group = group or machine.gpus
    sharded, parallel = SHARDED[config.parallel.strategy], config.parallel

    def state(name: str, bytes_each: int) -> int:
        return bytes_each * PARAMETERS // (group if name in sharded else 1)

    memory = PlannedMemory(
        (MemoryPart("weights", state("weights", 4), "exact"), MemoryPart("gradients", state("gradients", 4), "exact"),
         MemoryPart("optimizer state", 0 if parallel.offload == "cpu" else state("optimizer", 8), "exact"),
         MemoryPart("activations", int(KEPT[parallel.activation_checkpointing] * GIB * micro), "traced"),
         MemoryPart("caching allocator", 2 * GIB, "replayed"), MemoryPart("CUDA and NCCL", 2 * GIB, "assumed")),
        state("weights", 4) + state("optimizer", 8), "language_model", "backward", "blocks.31", 12 * PARAMETERS)
    tokens = config.train.global_batch_size * 8192
    flops = 6.0 * PARAMETERS * tokens / machine.gpus
    product = Operation("aten.mm", "product", "language_model", "forward", False, (8192, 4096, 4096), "bfloat16", flops, GIB, 1)
    exchanges = (Exchange("all_gather", "language_model", "forward", 4 * PARAMETERS, group, False, True, accumulation),)
    busy = flops / 4e14 * TIME[parallel.activation_checkpointing]
    waiting = 0.1 * accumulation * len(sharded) / 3 + (10.0 if parallel.offload == "cpu" else 0.0)
    seconds = (TimePart("matrix products", busy), TimePart("waiting for the network", waiting))
    step = PlannedStep(PARAMETERS, config.train.global_batch_size, tokens, micro, accumulation, memory, (product,), exchanges)
    mfu = flops / (busy + waiting) / gpu.peak(config.train.precision)
    return Plan(config, machine, gpu, terms or Terms(), step, PlannedTime(seconds, 0.2, flops * machine.gpus, mfu))


@pytest.fixture(name="llama", scope="session")
def _llama() -> Callable[..., Config]:
    return llama


@pytest.fixture(name="hand_made", scope="session")
def _hand_made() -> Callable[..., Plan]:
    """`hand_made(config, machine, terms)`: a plan in closed form."""
    return hand_made
