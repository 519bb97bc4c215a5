"""bf16 under every strategy and fp16 with its loss scaler are close to fp32, and are not fp32."""

from __future__ import annotations

import pytest

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def bf16(engines):
    variants = {strategy: {"strategy": strategy, "precision": "bf16", "clip": 1.0} for strategy in STRATEGIES}
    rotary = {"strategy": "fsdp2", "precision": "bf16", "preset": "llama", "steps": 1}
    return engines({**variants, "fp32": {"strategy": "ddp", "clip": 1.0}, "rotary": rotary})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_is_close_to_fp32(strategy, bf16, difference):
    losses, full = ([step["loss"] for step in bf16[name]["steps"]] for name in (strategy, "fp32"))
    # bf16 keeps 8 bits: 0.4 % a number, and the mean over 256 targets is nearer.
    assert 1e-7 < difference(losses, full) < 5e-3


def test_sharded_blocks_in_bf16_turn_by_angles_in_fp32(bf16, worker):
    """fsdp2 rounds what a block is given; a network in bf16 that is not sharded computes its angles in fp32."""
    network, tokens = worker.text_network(preset="llama").bfloat16(), worker.token_batch(0, ragged=False)
    halves = [network(tokens[rank::2, :-1], targets=tokens[rank::2, 1:]).double() for rank in (0, 1)]
    assert bf16["rotary"]["steps"][0]["loss"] == (sum(halves) / tokens[:, 1:].numel()).item()


@pytest.mark.slow
def test_fp16_trains_and_its_scaler_survives_a_resume(train, difference, tmp_path):
    settings = {"train.steps": 6, "schedule.warmup_steps": 3}
    full = train(tmp_path / "fp32", "single", **settings)
    settings = {**settings, "train.precision": "fp16", "train.checkpoint_every": 3}
    straight = train(tmp_path / "fp16", "ddp", **settings)
    assert 1e-7 < difference(straight.losses(), full.losses()) < 2e-3

    resumed = train(straight.cut_after(3).folder, "ddp", **settings)
    assert resumed.resumed_from() == ["step-00000003"]
    # Steps without overflow since the scale last changed: a scaler that began anew would have counted three.
    assert resumed.checkpoint(6).state()["scalers"]["gpt"]["_growth_tracker"] == 6
    assert resumed.checkpoint(6).digest() == straight.checkpoint(6).digest()
