"""What every process holds while gradients are accumulated, and of the optimizer; and shards that are replicated."""

from __future__ import annotations

import pytest

ADAMW = {"name": "adamw", "lr": 1e-3}
VARIANTS = {
    "ddp": {"strategy": "ddp"}, "after the last": {"strategy": "fsdp2"},
    "after every": {"strategy": "fsdp2", "reduce_gradients": "every_micro_batch"},
    "hybrid": {"strategy": "fsdp2", "shard_size": 2},
    "hybrid, after every": {"strategy": "fsdp2", "shard_size": 2, "reduce_gradients": "every_micro_batch"},
    "hybrid, bf16": {"strategy": "fsdp2", "shard_size": 2, "precision": "bf16"},
    "kept after forward": {"strategy": "fsdp2", "reshard_after_forward": False},
    "prefetched": {"strategy": "fsdp2", "prefetch_blocks": 2},
    "kept and prefetched, hybrid": {"strategy": "fsdp2", "shard_size": 2, "reshard_after_forward": False, "prefetch_blocks": 1},
    "muon": {"strategy": "fsdp2", "optimizer": {"name": "muon", "lr": 1e-3}},
    "muon hybrid": {"strategy": "fsdp2", "shard_size": 2, "optimizer": {"name": "muon", "lr": 1e-3}},
    "zero2": {"strategy": "zero2"}, "zero3": {"strategy": "zero3"},
}  # fmt: skip
PROCESSES = 4


@pytest.fixture(scope="module")
def results(engines):
    common = {"accumulation": 2, "weigh_gradients": True, "width": 128, "optimizer": ADAMW, "steps": 2}
    return engines({name: {**common, **variant} for name, variant in VARIANTS.items()}, PROCESSES)


@pytest.mark.parametrize(("name", "after_first", "after_last"), [
    ("ddp", 1, 1), ("after the last", 1, 1 / 4), ("after every", 1 / 4, 1 / 4), ("hybrid", 1, 1 / 2),
    ("hybrid, after every", 1 / 2, 1 / 2)])  # fmt: skip
def test_bytes_of_gradients_after_the_first_and_the_last_micro_batch(name, after_first, after_last, results):
    whole = 4 * results["ddp"]["parameters"]
    for process in results[name]["gradient_bytes"]:
        assert process[:2] == pytest.approx([after_first * whole, after_last * whole], rel=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_dry_batch_reserves_what_the_optimizer_will_hold(name, results):
    # Beside the state stand a few bytes of step counts.
    assert results[name]["bytes_foreseen"] == pytest.approx(results[name]["bytes_at_rest"], rel=1e-3)


@pytest.mark.parametrize(("name", "like"), [("after every", "ddp"), ("hybrid", "ddp"), ("hybrid, after every", "ddp"),
                                            ("muon hybrid", "muon")])
def test_losses_do_not_depend_on_shards(name, like, results, difference):
    for metric in ("loss", "grad_norm"):
        values, expected = ([step[metric] for step in results[each]["steps"]] for each in (name, like))
        assert difference(values, expected) < 1e-5


def test_replicated_shards_in_bf16_are_close_to_fp32(results, difference):
    losses, full = ([step["loss"] for step in results[name]["steps"]] for name in ("hybrid, bf16", "ddp"))
    assert 1e-7 < difference(losses, full) < 5e-3


@pytest.mark.parametrize(("name", "like"), [("kept after forward", "after the last"), ("prefetched", "after the last"),
                                            ("kept and prefetched, hybrid", "hybrid")])
def test_when_weights_are_gathered_changes_no_bit(name, like, results):
    assert results[name]["steps"] == results[like]["steps"]
    assert results[name]["bytes_at_rest"] == results[like]["bytes_at_rest"]


def test_groups_of_processes_hold_the_whole_between_them(results):
    at_rest = {name: results[name]["bytes_at_rest"] for name in ("ddp", "after the last", "hybrid")}
    assert at_rest["hybrid"] == pytest.approx([each / 2 for each in at_rest["ddp"]], rel=0.01)
    assert at_rest["after the last"] == pytest.approx([each / 4 for each in at_rest["ddp"]], rel=0.01)


@pytest.mark.slow
def test_a_run_of_replicated_shards_goes_on_as_one_process_and_back(train, tmp_path, difference):
    """Four processes in groups of two to step 6; one to step 8; four, sharded once, to the end."""
    hybrid = {"parallel.shard_size": 2, "train.checkpoint_every": 2, "train.ema_half_life": 100}
    alone = train(tmp_path / "alone", "single", **{**hybrid, "parallel.shard_size": "null"})
    started = train(tmp_path / "hybrid", "fsdp2", 4, **hybrid)
    assert difference(started.losses(), alone.losses()) < 1e-4
    one = train(started.cut_after(6).folder, "single", **{**hybrid, "parallel.shard_size": "null"})
    assert one.resumed_from() == ["step-00000006"]
    back = train(one.cut_after(8).folder, "fsdp2", 4, **{**hybrid, "parallel.shard_size": "null"})
    assert difference(back.losses(), alone.losses()) < 1e-4
    assert back.order() == alone.order()
