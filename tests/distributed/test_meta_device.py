"""Networks built on the meta device: no process ever holds the whole of a sharded one, and it trains as one process does."""

from __future__ import annotations

import pytest

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
SHAPE = {"layers": 4, "width": 128}
ADAMW = {"name": "adamw", "lr": 1e-3}
STEPS = 4


@pytest.fixture(scope="module")
def born_on_meta(engines):
    common = {"meta": True, "steps": STEPS, "optimizer": ADAMW, **SHAPE}
    variants = {strategy: {"strategy": strategy, **common} for strategy in STRATEGIES}
    bf16 = {f"{name} bf16": {**variants[name], "precision": "bf16"} for name in ("zero2", "zero3", "fsdp2")}
    tied = {f"{name} tied": {**variants[name], "tied_modules": True} for name in ("ddp", "zero3", "fsdp2")}
    return engines(variants | bf16 | tied)


@pytest.fixture(scope="module")
def alone(worker):
    """(losses of the same training in this process, bytes of the whole network, bytes of its largest tensor)."""
    sizes = [p.numel() * p.element_size() for p in worker.text_network(**SHAPE).parameters()]
    return worker.train_plainly(ADAMW, STEPS, **SHAPE)[0], sum(sizes), max(sizes)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "ddp tied", "zero3 tied", "fsdp2 tied"])
def test_it_trains_as_one_process_does(strategy, born_on_meta, alone, difference):
    assert difference([step["loss"] for step in born_on_meta[strategy]["steps"]], alone[0]) < 1e-5


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_bf16_starts_from_the_same_weights_unrounded(strategy, born_on_meta, alone, difference):
    assert 1e-7 < difference([step["loss"] for step in born_on_meta[f"{strategy} bf16"]["steps"]], alone[0]) < 5e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_tensor_is_drawn_by_one_process_and_is_what_one_alone_draws(strategy, born_on_meta, worker):
    began, network = born_on_meta[strategy]["began"], worker.text_network(**SHAPE)
    assert began["digest"] == worker.digest_of(iter(network.state_dict().items()))
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert sorted(name for asked in began["asked"] for name in asked) == sorted(sizes), "each once"
    for asked in began["asked"]:
        assert 0.4 * sum(sizes.values()) < sum(sizes[name] for name in asked) < 0.6 * sum(sizes.values())


def test_what_one_process_cannot_read_is_told_by_all(born_on_meta):
    assert born_on_meta["ddp"]["began"]["refused"] == ["UserError: weights.bin: gone"] * 2 + [
        "RuntimeError: KeyError: 'x'", "KeyError: 'x'"]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_no_process_ever_holds_the_whole_network(strategy, born_on_meta, alone):
    _, whole, largest = alone
    for held in born_on_meta[strategy]["bytes_while_filled"]:
        # Its half, padded, and of ZeRO-3 the tensors of one leaf module.
        assert 0.4 * whole < held < 0.52 * whole + 1.1 * largest < 0.75 * whole


def test_ddp_holds_it_all(born_on_meta, alone):
    assert min(born_on_meta["ddp"]["bytes_while_filled"]) == alone[1]
