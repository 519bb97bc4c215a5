"""What every process holds while gradients are accumulated, and of the optimizer; and shards that are replicated."""

from __future__ import annotations

import pytest

ADAMW = {"name": "adamw", "lr": 1e-3}
QUICK = {
    "ddp": {"strategy": "ddp"}, "after the last": {"strategy": "fsdp2"},
    "after every": {"strategy": "fsdp2", "reduce_gradients": "every_micro_batch"},
    "hybrid": {"strategy": "fsdp2", "shard_size": 2},
    "hybrid, after every": {"strategy": "fsdp2", "shard_size": 2, "reduce_gradients": "every_micro_batch"},
}  # fmt: skip
SLOW = {
    "hybrid, bf16": {"strategy": "fsdp2", "shard_size": 2, "precision": "bf16"},
    "kept after forward": {"strategy": "fsdp2", "reshard_after_forward": False},
    "prefetched": {"strategy": "fsdp2", "prefetch_blocks": 2},
    "kept and prefetched, hybrid": {"strategy": "fsdp2", "shard_size": 2, "reshard_after_forward": False, "prefetch_blocks": 1},
    "muon": {"strategy": "fsdp2", "optimizer": {"name": "muon", "lr": 1e-3}},
    "muon hybrid": {"strategy": "fsdp2", "shard_size": 2, "optimizer": {"name": "muon", "lr": 1e-3}},
    "zero2": {"strategy": "zero2"}, "zero3": {"strategy": "zero3"}, "zero3 in groups": {"strategy": "zero3", "shard_size": 2},
}  # fmt: skip
COMPARED = {name: QUICK[name] for name in ("ddp", "after the last", "hybrid")}
PROCESSES = 4


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def measured(engines):
    """`measured(name)`: what was measured of a variant and of all those that were made in the same start."""
    common = {"accumulation": 2, "weigh_gradients": True, "width": 128, "optimizer": ADAMW, "steps": 2}

    def of(name):
        together = QUICK if name in QUICK else {**COMPARED, **SLOW}
        return engines({each: {**common, **variant} for each, variant in together.items()}, PROCESSES)

    return of


@pytest.mark.parametrize(("name", "after_first", "after_last"), [
    ("ddp", 1, 1), ("after the last", 1, 1 / 4), ("after every", 1 / 4, 1 / 4), ("hybrid", 1, 1 / 2),
    ("hybrid, after every", 1 / 2, 1 / 2)])  # fmt: skip
def test_bytes_of_gradients_after_the_first_and_the_last_micro_batch(name, after_first, after_last, measured):
    results = measured(name)
    whole = 4 * results["ddp"]["parameters"]
    for process in results[name]["gradient_bytes"]:
        # The last exchange may still hold its buffer, of the parameters outside the blocks: 3 % of half of them.
        assert process[:2] == pytest.approx([after_first * whole, after_last * whole], rel=0.04)


@pytest.mark.parametrize("name", [*QUICK, *map(slow, SLOW)])
def test_the_dry_batch_reserves_what_the_optimizer_will_hold(name, measured):
    # Beside the state stand a few bytes of step counts.
    found = measured(name)[name]
    assert found["bytes_foreseen"] == pytest.approx(found["bytes_at_rest"], rel=1e-3)


@pytest.mark.parametrize(("name", "like"), [("after every", "ddp"), ("hybrid", "ddp"), ("hybrid, after every", "ddp"),
                                            slow("muon hybrid", "muon")])
def test_losses_do_not_depend_on_shards(name, like, measured, difference):
    results = measured(name)
    for metric in ("loss", "grad_norm"):
        values, expected = ([step[metric] for step in results[each]["steps"]] for each in (name, like))
        assert difference(values, expected) < 1e-5


@pytest.mark.slow
def test_replicated_shards_in_bf16_are_close_to_fp32(measured, difference):
    results = measured("hybrid, bf16")
    losses, full = ([step["loss"] for step in results[name]["steps"]] for name in ("hybrid, bf16", "ddp"))
    assert 1e-7 < difference(losses, full) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "like"), [("kept after forward", "after the last"), ("prefetched", "after the last"),
                                            ("kept and prefetched, hybrid", "hybrid")])
def test_when_weights_are_gathered_changes_no_bit(name, like, measured):
    results = measured(name)
    assert results[name]["steps"] == results[like]["steps"]
    assert results[name]["bytes_at_rest"] == results[like]["bytes_at_rest"]


def test_groups_of_processes_hold_the_whole_between_them(measured):
    results = measured("hybrid")
    at_rest = {name: results[name]["bytes_at_rest"] for name in ("ddp", "after the last", "hybrid")}
    assert at_rest["hybrid"] == pytest.approx([each / 2 for each in at_rest["ddp"]], rel=0.01)
    assert at_rest["after the last"] == pytest.approx([each / 4 for each in at_rest["ddp"]], rel=0.01)


LARGE = 2 * (3 * 128 * 128 + 128 * 128 + 2 * 4 * 128 * 128)
"""Elements of the blocks' matrices; all other parameters are too small for ZeRO-3 to give them back."""


@pytest.mark.slow
def test_zero_in_groups_changes_no_bit_and_holds_a_second_copy_between_neighbours(measured):
    """From the backward of a micro-batch to the update: between steps it is gone."""
    results = measured("zero3 in groups")
    plain, groups = results["zero3"], results["zero3 in groups"]
    assert groups["steps"] == plain["steps"]
    assert groups["bytes_at_rest"] == plain["bytes_at_rest"]
    # The micro-batches of the second step; in the first DeepSpeed learns the order of layers, and gives all of them back.
    more = [[mine - its for mine, its in zip(*both, strict=True)][2:]
            for both in zip(groups["gradient_bytes"], plain["gradient_bytes"], strict=True)]
    assert more == [[4 * LARGE // 2] * 2] * PROCESSES


BYTES = {"fp32": 4, "bf16": 2}
OTHERWISE = {"given back": {"live": 1, "meta": True}, "offloaded": {"offload": "cpu", "activation_checkpointing": "full"}}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, pytest.param(PROCESSES, marks=[pytest.mark.matrix, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("other", OTHERWISE)
def test_zero_in_groups_of_any_size_changes_no_bit(other, precision, processes, engines):
    """Where all is given back after each forward, too; one engine after the other, of other groups and of none."""
    common = {"strategy": "zero3", "accumulation": 2, "weigh_gradients": True, "width": 128, "optimizer": ADAMW, "steps": 3}
    found = engines({f"{name}, {kind}, {size}": {**common, **settings, "precision": kind, "shard_size": size}
                     for name, settings in OTHERWISE.items() for kind in BYTES
                     for size in (2, None, 1, 4)[: 3 if processes == 2 else 4]}, processes)
    plain = found[f"{other}, {precision}, None"]
    for size in (1, 2, 4)[: 2 if processes == 2 else 3]:
        groups = found[f"{other}, {precision}, {size}"]
        assert groups["steps"] == plain["steps"] and groups["bytes_at_rest"] == plain["bytes_at_rest"]
        more = {mine - its for both in zip(groups["gradient_bytes"], plain["gradient_bytes"], strict=True)
                for mine, its in zip(both[0][2:], both[1][2:], strict=True)}
        assert more == {BYTES[precision] * LARGE // size if size < processes else 0}


@pytest.mark.slow
def test_a_run_of_second_copies_goes_on_as_one_process_and_back(whole_runs, train, tmp_path, difference):
    settings = {"train.checkpoint_every": 2, "train.evaluate_every": 2, "train.ema_half_life": 100}
    whole = {**settings, "parallel.strategy": "zero3"}
    groups = {**whole, "parallel.shard_size": 2}
    plain, started, same = whole_runs({
        "plain": {"settings": whole}, "groups": {"settings": groups},
        "on in groups": {"settings": groups, "again_from": ["plain", 6]}}, PROCESSES).values()
    assert started.losses() == plain.losses()
    assert started.digest() == plain.digest()
    assert same.resumed_from() == ["step-00000006"]
    assert same.losses() == plain.losses() and same.digest() == plain.digest()
    one = train(started.cut_after(6, tmp_path / "one").folder, "single", **settings)
    assert one.resumed_from() == ["step-00000006"]
    back = train(one.cut_after(8).folder, "zero3", 2, **{**settings, "parallel.shard_size": 2})
    assert difference(back.losses(), plain.losses()) < 1e-4
    assert back.order() == plain.order()


@pytest.mark.slow
def test_a_run_of_replicated_shards_goes_on_as_one_process_and_back(train, tmp_path, difference):
    """Four processes in groups of two to step 6; one to step 8; two, sharded once, to the end."""
    hybrid = {"parallel.shard_size": 2, "train.checkpoint_every": 2, "train.ema_half_life": 100}
    alone = train(tmp_path / "alone", "single", **{**hybrid, "parallel.shard_size": "null"})
    started = train(tmp_path / "hybrid", "fsdp2", 4, **hybrid)
    assert difference(started.losses(), alone.losses()) < 1e-4
    one = train(started.cut_after(6).folder, "single", **{**hybrid, "parallel.shard_size": "null"})
    assert one.resumed_from() == ["step-00000006"]
    back = train(one.cut_after(8).folder, "fsdp2", 2, **{**hybrid, "parallel.shard_size": "null"})
    assert difference(back.losses(), alone.losses()) < 1e-4
    assert back.order() == alone.order()
