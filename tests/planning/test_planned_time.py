"""The clock of a plan against closed forms: what one product, one collective, one network come to by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.planning.account import Exchange, Machine, Operation, PlannedMemory, PlannedStep
from genscale.planning.profiles import GpuProfile, profile
from genscale.planning.time import exchange_seconds, model_flops, product_share, seconds_of, time_of

NODES = Machine("h100", 32, 8)


def operation(kind="product", shape=(128 * 132, 256, 4096), part="forward", head=False, dtype="bfloat16", flops=None, size=0,
              count=1.0) -> Operation:
    flops = 2.0 * math.prod(shape) if flops is None else flops
    return Operation("aten.any", kind, "train", part, head, shape, dtype, flops, size, count)


def exchange(name="all_gather", size=2**30, ranks=32, within=False, part="forward", hidden=True, last=False) -> Exchange:
    return Exchange(name, "train", part, size, ranks, within, hidden, 1, last)


def step(operations=(), exchanges=(), accumulation=1) -> PlannedStep:
    memory = PlannedMemory((), 0, "train", "forward", "", 0)
    return PlannedStep(1, 1, None, 1, accumulation, memory, tuple(operations), tuple(exchanges))


@pytest.fixture
def ideal() -> GpuProfile:
    """An H100 that reaches everything that its data sheet says."""
    return replace(profile("h100"), product=1.0, half=0.0, attention=1.0, memory=1.0, exposed=0.0, launch=0.0, link_share=1.0,
                   network_share=1.0, latency=0.0)


def test_a_product_that_fills_the_device_takes_its_flops(ideal):
    seconds = seconds_of(operation(), ideal, "bf16")
    assert seconds == pytest.approx(2 * 128 * 132 * 256 * 4096 / 989.4e12)
    assert seconds_of(operation(dtype="float32"), ideal, "bf16") == pytest.approx(seconds * 989.4 / 67)
    assert seconds_of(operation(size=10**9), ideal, "bf16") == pytest.approx(10**9 / 3.35e12)  # and its memory traffic, if more


def test_one_tile_more_takes_another_wave(ideal):
    """Half of what the last wave leaves idle is lost."""
    assert product_share(1, 128 * 132, 256, 4096, ideal) == 1
    assert product_share(1, 128 * 133, 256, 4096, ideal) < 0.85
    half = replace(ideal, half=512.0)
    assert product_share(1, 128 * 132, 256, 512, half) == pytest.approx(0.5 * 0.5)


def test_a_ring_within_a_node(ideal):
    """Each rank passes on all but its own part, over NVLink; an all-reduce does it twice."""
    one = exchange(ranks=8, within=True)
    assert exchange_seconds(one, NODES, ideal) == pytest.approx(2**30 * 7 / 8 / 450e9)
    assert exchange_seconds(replace(one, name="all_reduce"), NODES, ideal) == pytest.approx(2 * 2**30 * 7 / 8 / 450e9)
    assert exchange_seconds(replace(one, ranks=1), NODES, ideal) == 0
    assert exchange_seconds(one, NODES, replace(ideal, latency=1e-5)) == pytest.approx(2**30 * 7 / 8 / 450e9 + 3e-5)


def test_between_nodes_all_cards_of_a_node_carry(ideal):
    """Of a group of everybody, the data enter a node once; eight groups of one rank a node share its cards."""
    everybody, beside = exchange(ranks=32), exchange(ranks=4)
    assert exchange_seconds(everybody, NODES, ideal) == pytest.approx(2**30 * 31 / 32 / 400e9)
    assert exchange_seconds(beside, NODES, ideal) == pytest.approx(2**30 * 3 / 4 / (400e9 / 8))
    slow = replace(NODES, between_nodes=100e9)
    assert exchange_seconds(everybody, slow, ideal) == pytest.approx(2**30 * 31 / 32 / 100e9)


def test_parts_add_up_and_are_sorted():
    work = [operation(count=40), operation("attention", (8, 32, 2048, 2048, 128), flops=1e12, count=4),
            operation("elementwise", (8, 2048, 4096), flops=0, size=10**9, count=30), operation(part="backward", count=80),
            operation(part="recomputation", count=40), operation(head=True, count=3),
            operation("convolution", (8, 64, 64, 32, 32, 3, 3), flops=1e10),
            operation("elementwise", (10**8,), part="optimizer", flops=0, size=4 * 10**9)]
    time = time_of(step(work, [exchange(), exchange("reduce_scatter", part="backward")]), NODES, profile("h100"), "bf16", False)
    seconds = [part.seconds for part in time.parts]
    assert time.step == sum(seconds) and seconds == sorted(seconds, reverse=True) and min(seconds) > 0
    assert {part.category for part in time.parts} == {
        "matrix products", "attention", "convolutions", "recomputation", "head and loss", "elementwise", "optimizer",
        "waiting for the network"}
    assert 0 < time.mfu < 1 and time.spread >= profile("h100").spread
    longer = time_of(step([*work, operation()]), NODES, profile("h100"), "bf16", False)
    assert longer.step > time_of(step(work), NODES, profile("h100"), "bf16", False).step


def test_exchanges_hide_behind_computation(ideal):
    """What is longer than most of it shows; before the last micro-batch's alone, sooner."""
    def waiting(which: Exchange, gpu: GpuProfile = ideal) -> float:
        parts = time_of(step([operation(count=10**5)], [which], accumulation=8), NODES, gpu, "bf16", False).parts
        return sum(part.seconds for part in parts if part.category == "waiting for the network")

    computing = 10**5 * seconds_of(operation(), ideal, "bf16")
    alone = exchange_seconds(exchange(size=2**38), NODES, ideal)
    assert computing / 8 < alone < 0.85 * computing
    assert waiting(exchange(size=2**38)) == 0 and waiting(exchange(size=2**38, hidden=False)) == pytest.approx(alone)
    assert waiting(exchange(size=2**38, last=True)) == pytest.approx(alone - 0.85 * computing / 8)
    assert waiting(exchange(size=2**38), replace(ideal, exposed=0.5)) == pytest.approx(alone / 2)


def test_small_networks_wait_for_their_launches(ideal):
    """A GPU only where the host is slower than it; on the CPU, both are one."""
    tiny = step([operation(shape=(64, 64, 64), count=1000)])
    slow_host = replace(ideal, launch=1e-5)
    assert time_of(tiny, NODES, slow_host, "bf16", False).step == pytest.approx(1e-2)
    assert time_of(step([operation(count=1000)]), NODES, slow_host, "bf16", False).step == pytest.approx(
        1000 * seconds_of(operation(), ideal, "bf16"))
    cpu = profile("cpu")
    assert time_of(step([operation(dtype="float32")]), Machine("cpu", 1, 1), cpu, "fp32", False).step == pytest.approx(
        seconds_of(operation(dtype="float32"), cpu, "fp32") + cpu.launch)


def test_compiling_fuses_what_is_elementwise_in_blocks(ideal):
    def elementwise(part="forward", head=False) -> Operation:
        return operation("elementwise", (8, 2048, 4096), part, head, flops=0, size=10**9)

    def gain(work: Operation) -> float:
        eager, compiled = (time_of(step([work]), NODES, ideal, "bf16", mode).step for mode in (False, True))
        return compiled / eager

    assert gain(elementwise()) < 0.5
    assert gain(elementwise("optimizer")) == gain(elementwise(head=True)) == gain(operation()) == 1


def test_model_flops_are_those_that_mfu_is_logged_with(monkeypatch, request):
    """Of a GPT in closed form, with recomputation, the same number as `GPT.flops_per_token`, to the last."""
    monkeypatch.syspath_prepend(str(request.config.rootpath / "benchmarks"))
    from plan_shapes import step_of

    settings = GPTSettings(layers=3, heads=8, kv_heads=2, width=512, mlp_width=1280, positions=256, activation="swiglu",
                           norm="rmsnorm", position_encoding="rotary", tied=False, bias=False)
    model = {"layers": 3, "heads": 8, "kv_heads": 2, "width": 512, "head_width": 64, "mlp_width": 1280, "vocab": 1000,
             "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary", "tied": False, "bias": False}
    row = {"model": model, "micro_batch": 4, "accumulation": 2, "seq": 256, "gpus": 1, "gpus_per_node": 8, "strategy": "single",
           "checkpointing": "full", "precision": "bf16"}
    with torch.device("meta"):
        network = GPT(settings, 1000)
    assert model_flops(step_of(row).operations) == network.flops_per_token(256) * 4 * 2 * 256


def test_an_mfu_needs_a_peak():
    assert time_of(step([operation(dtype="float32")]), Machine("cpu", 1, 1), profile("cpu"), "fp32", False).mfu is None
    with pytest.raises(UserError, match="use fp16 or fp32"):
        time_of(step([operation()]), Machine("v100", 1, 1), profile("v100"), "bf16", False)
