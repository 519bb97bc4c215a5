"""What the libraries below do without a word when they are given other than what was asked (docs/design.md, section 5)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genscale.parallel.zero import communication

ZERO = ("zero1", "zero2", "zero3")
SHARDED = (*ZERO, "fsdp2")
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
# Decoupled weight decay and an L2 penalty are far apart with this much of it.
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 2.0}


def losses(result):
    return [step["loss"] for step in result["steps"]]


# --- asked for ZeRO and got DDP ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_cpu(engines):
    """ACCELERATE_USE_CPU=true makes plain DDP of Accelerate's own ZeRO; `auto` takes what the launcher was configured with."""
    asked = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    return engines({"auto": {"strategy": "auto", "optimizer": ADAMW}}, extra=asked)["auto"]


@pytest.fixture(scope="module")
def everything(engines):
    """All other runs of this file, in one start of two processes."""
    variants = {f"{name} clip 0": {"strategy": name, "optimizer": SGD} for name in ("ddp", *SHARDED)}
    variants |= {f"{name} clip 0.1": {"strategy": name, "clip": 0.1, "optimizer": SGD} for name in ("ddp", *SHARDED)}
    variants |= {f"{name} adamw": {"strategy": name, "optimizer": ADAMW} for name in ("ddp", *SHARDED)}
    variants |= {f"{name} offload {optimizer['name']}": {"strategy": name, "offload": "cpu", "optimizer": optimizer}
                 for name in ZERO for optimizer in (SGD, ADAMW)}
    variants |= {f"{name} in {parts}": {"strategy": name, "buckets": parts, "accumulation": 2, "clip": 0.1, "optimizer": ADAMW}
                 for name in ZERO for parts in (1, 8)}
    return engines(variants, extra={"ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_asked_for_is_zero_made(stage, everything):
    result = everything[f"zero{stage} adamw"]
    assert (result["wrapper"], result["stage"], result["optimizer"]) == ("DeepSpeedEngine", stage, "AdamW")


def test_zero_of_the_launcher_is_zero_made(on_the_cpu):
    assert (on_the_cpu["wrapper"], on_the_cpu["stage"]) == ("DeepSpeedEngine", 2)


@pytest.mark.parametrize("strategy", SHARDED)
def test_optimizer_state_is_sharded(strategy, everything):
    """AdamW on two processes, in units of the weights. ddp: 1 + 2 of moments. zero1, zero2: 1 + 1/2 of master weights + 1 of
    moments. zero3: 1/2 + 1/2 of master weights + 1. fsdp2: 1/2 + 1."""
    share = {"zero1": 2.5 / 3, "zero2": 2.5 / 3, "zero3": 2 / 3, "fsdp2": 1.5 / 3}[strategy]
    replicated = max(everything["ddp adamw"]["bytes_at_rest"])
    for held in everything[f"{strategy} adamw"]["bytes_at_rest"]:
        assert held == pytest.approx(share * replicated, rel=0.05)


# --- buckets of a size that fits another model ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ZERO)
def test_gradients_that_are_sent_in_parts_beside_the_backward_are_the_same(strategy, everything):
    assert everything[f"{strategy} in 8"]["steps"] == everything[f"{strategy} in 1"]["steps"]


def test_buckets_fit_the_model(worker):
    """DeepSpeed allocates 2 GB for two buckets of its own size, and more than one is what overlaps with a backward."""
    network = worker.text_network(layers=8)
    sizes = [parameter.numel() for parameter in network.parameters()]
    assert sum(sizes) / 8 > max(sizes)
    found = {device: communication(network, 2, device) for device in ("cpu", "cuda")}
    assert {device: each["reduce_bucket_size"] for device, each in found.items()} == {
        "cpu": sum(sizes), "cuda": -(-sum(sizes) // 8)}
    assert [each["overlap_comm"] for each in found.values()] == [False, True]
    with torch.device("meta"):
        large = nn.Linear(2**15, 2**15)  # which a bucket cannot hold
    assert communication(large, 1, "cuda")["allgather_bucket_size"] == 500_000_000


# --- clipping, and the optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0, 0.1])
@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_clip_is_what_was_asked(strategy, clip, everything, worker, difference):
    """0 does not clip, where Accelerate's plugin would clip at 1.0."""
    expected, norms = worker.train_plainly(SGD, clip=clip)
    assert max(norms) > 1, "nothing to clip: the test would prove nothing"
    result = everything[f"{strategy} clip {clip}"]
    assert difference(losses(result), expected) < 1e-5
    # Logged before clipping.
    assert difference([step["grad_norm"] for step in result["steps"]], norms) < 1e-4


@pytest.mark.parametrize("strategy", ["ddp", *SHARDED])
def test_adamw_is_plain_adamw(strategy, everything, worker, difference):
    assert difference(losses(everything[f"{strategy} adamw"]), worker.train_plainly(ADAMW)[0]) < 1e-5


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize(("optimizer", "kind"), [(SGD, "SGD"), (ADAMW, "AdamW")])
def test_offload_keeps_the_optimizer(strategy, optimizer, kind, everything, worker, difference):
    """DeepSpeed would make Adam of SGD, and Adam with an L2 penalty of its own AdamW."""
    result = everything[f"{strategy} offload {optimizer['name']}"]
    assert result["optimizer"] == kind
    assert difference(losses(result), worker.train_plainly(optimizer)[0]) < 1e-5


# --- start ----------------------------------------------------------------------------------------------------------------


def test_stale_lock_of_a_killed_extension_build_does_not_hang(engines, tmp_path):
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils"):
        for folder in (tmp_path / name, tmp_path / f"py311_cpu/{name}"):
            folder.mkdir(parents=True)
            (folder / "lock").touch()
    result = engines({"zero2": {"strategy": "zero2", "offload": "cpu", "optimizer": ADAMW, "steps": 1}},
                     extra={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert result["zero2"]["stage"] == 2
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"lock"}, "an extension was built"


# --- activation checkpointing and compile ---------------------------------------------------------------------------------


OFFLOADED = ("ddp", *SHARDED)


@pytest.fixture(scope="module")
def recomputed(engines):
    # DeepSpeed's stage 3 replaces torch's `linear` in the whole process by one that adds the bias in place, onto the product
    # that selective keeps: ours must do without it, also in a process where another stage 3 has left it behind.
    common = {"accumulation": 2, "steps": 2, "count_operations": True}
    variants = {f"{strategy} {mode}": {"strategy": strategy, "activation_checkpointing": mode, **common}
                for strategy in ("ddp", "zero1", "zero2", "fsdp2", "zero3") for mode in ("none", "full", "selective")}
    variants |= {f"{strategy} offloaded": {**variants[f"{strategy} full"], "activation_offload": True}
                 for strategy in OFFLOADED}
    return engines(variants)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_recomputed_activations_change_no_loss(strategy, mode, recomputed, difference):
    kept, result = recomputed[f"{strategy} none"], recomputed[f"{strategy} {mode}"]
    assert difference(losses(result), losses(kept)) < 1e-6
    # Full computes everything twice. Selective does so too, but for the matrix products, which it answers from memory; in both
    # passes its dispatch mode makes the profiler see each operation that is really done a second time.
    activations, products = {"full": (2, 2), "selective": (2 + 2, 2 + 1)}[mode]
    if (strategy, mode) == ("zero3", "selective"):
        kept = recomputed["ddp none"]  # with torch's own linear
    assert result["activations"] == activations * kept["activations"]
    assert result["matrix_products"] == products * kept["matrix_products"]


@pytest.mark.parametrize("strategy", OFFLOADED)
def test_inputs_that_wait_in_host_memory_change_no_bit(strategy, recomputed):
    assert recomputed[f"{strategy} offloaded"]["steps"] == recomputed[f"{strategy} full"]["steps"]


@pytest.mark.slow
def test_compiled_blocks_change_no_loss(engines, difference):
    results = engines({"eager": {"clip": 1.0}, "compiled": {"clip": 1.0, "compile": True}})
    assert difference(losses(results["compiled"]), losses(results["eager"])) < 1e-5
    assert results["eager"]["compiled_graphs"] == 0 < results["compiled"]["compiled_graphs"]


WRAPPED = [(strategy, mode) for strategy in ("ddp", "zero2", "zero3", "fsdp2") for mode in ("none", "full", "selective")]


@pytest.mark.slow
@pytest.mark.parametrize("modes", [
    pytest.param([("ddp", "none"), ("zero2", "full"), ("zero3", "full"), ("fsdp2", "selective")], id="each once"),
    pytest.param(WRAPPED, id="all", marks=pytest.mark.matrix)])  # fmt: skip
def test_masks_in_blocks_pass_through_what_every_strategy_wraps_blocks_in(modes, engines, difference):
    common = {"window": 8, "steps": 2, "accumulation": 2}
    blocks = {**common, "compile": True, "in_blocks": True}
    results = engines({"dense": common} | {
        f"{strategy} {mode}": {"strategy": strategy, "activation_checkpointing": mode, **blocks} for strategy, mode in modes})
    for strategy, mode in modes:
        assert difference(losses(results[f"{strategy} {mode}"]), losses(results["dense"])) < 1e-5, (strategy, mode)
