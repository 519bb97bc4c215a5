"""A run is the same run however it is sharded, interrupted or resized: real runs of `genscale train`."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def single(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("single") / "run", "single")


def check_same(straight, resumed, single, difference):
    assert difference(straight.losses(), single.losses()) <= 1e-5
    assert straight.order() == single.order()
    assert resumed.resumed_from() == ["step-00000005"]
    assert resumed.losses() == straight.losses()
    assert resumed.checkpoint(10).digest() == straight.checkpoint(10).digest()


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_equals_one_process_and_resumes_bit_for_bit(strategy, single, quick_runs, difference):
    """Accumulation 2 on two processes, AdamW in its warm-up, gradients clipped; and the same run cut after step 5."""
    check_same(quick_runs[strategy], quick_runs[f"{strategy} again"], single, difference)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", pytest.param("zero1", marks=pytest.mark.matrix)])
def test_processes_of_their_own_resume_bit_for_bit(strategy, single, train, difference, tmp_path):
    """The same, each life in new processes."""
    settings = {"train.checkpoint_every": 5, "train.micro_batch_size": 3}
    straight = train(tmp_path / "straight", strategy, **settings)
    check_same(straight, train(straight.cut_after(5).folder, strategy, **settings), single, difference)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_groups_equal_one_process_and_resume_bit_for_bit(strategy, single, train, difference, tmp_path):
    settings = {"parallel.shard_size": 2, "train.checkpoint_every": 5}
    straight = train(tmp_path / "straight", strategy, 4, **settings)
    assert difference(straight.losses(), single.losses()) <= 1e-5
    assert straight.order() == single.order()
    resumed = train(straight.cut_after(5).folder, strategy, 4, **settings)
    assert resumed.resumed_from() == ["step-00000005"]
    assert resumed.losses() == straight.losses()
    assert resumed.checkpoint(10).digest() == straight.checkpoint(10).digest()


@pytest.mark.parametrize(("strategy", "workers"), [
    ("ddp", 2), pytest.param("fsdp2", 1, marks=[pytest.mark.slow, pytest.mark.matrix])])  # fmt: skip
def test_loader_workers_change_nothing(strategy, workers, single, train, difference, tmp_path):
    run = train(tmp_path / "run", strategy, **{"data.workers": workers, "train.micro_batch_size": 2})
    assert run.order() == single.order()
    assert difference(run.losses(), single.losses()) <= 1e-5


SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "train.steps": 50}
MODERN = {"model.preset": "qwen3", "model.kv_heads": 1, "model.head_width": 8, "model.dropout": 0.2,
          "model.attention_dropout": 0.1, "data.separate_documents": "true", "optimizer.name": "muon", "train.steps": 6}
ON_TWO = {
    "sgd fsdp2": SGD, "modern ddp": {**MODERN, "train.micro_batch_size": 3},
    "modern fsdp2": {**MODERN, "train.micro_batch_size": 2},
    "started zero2": {"train.checkpoint_every": 3, "train.micro_batch_size": 3},
}  # fmt: skip
MATRIX = {f"sgd {strategy}": SGD for strategy in ("ddp", "zero1", "zero2", "zero3")}


@pytest.fixture(scope="module")
def two_processes(whole_runs):
    """`two_processes("<what> <strategy>")`: a run of those above, all of which are made in one start."""

    def run(name):
        settings = MATRIX if name in MATRIX else ON_TWO
        return whole_runs({each: {"settings": {**more, "parallel.strategy": each.split()[1]}}
                           for each, more in settings.items()})[name]

    return run


@pytest.fixture(scope="module")
def single_sgd(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("single-sgd") / "run", "single", **SGD)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(name, marks=pytest.mark.matrix)
                                                 for name in ("ddp", "zero1", "zero2", "zero3"))])  # fmt: skip
def test_sgd_equals_one_process_over_fifty_steps(strategy, single_sgd, two_processes, difference):
    assert single_sgd.losses()[-1] < 0.9 * single_sgd.losses()[0], "nothing was learned: equal losses would mean little"
    assert difference(two_processes(f"sgd {strategy}").losses(), single_sgd.losses()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, pytest.param(4, marks=pytest.mark.matrix)])
def test_more_than_two_processes_resume_bit_for_bit(processes, single, train, difference, tmp_path):
    """A sum of two numbers has one order only; from three on, the order of summation must survive a resume too."""
    straight = train(tmp_path / "straight", "ddp", processes, **{"train.checkpoint_every": 5})
    resumed = train(straight.cut_after(5).folder, "ddp", processes, **{"train.checkpoint_every": 5})
    assert resumed.resumed_from() == ["step-00000005"]
    assert difference(straight.losses(), single.losses()) <= 1e-5
    assert resumed.losses() == straight.losses()
    assert resumed.checkpoint(10).digest() == straight.checkpoint(10).digest()


@pytest.mark.slow
def test_dropout_document_masks_and_muon_are_the_same_on_any_shape(train, two_processes, difference, tmp_path):
    single = train(tmp_path / "single", "single", **MODERN)
    for strategy in ("ddp", "fsdp2"):
        assert difference(two_processes(f"modern {strategy}").losses(), single.losses()) <= 1e-5
    plain = train(tmp_path / "plain", "single", **{**MODERN, "model.dropout": 0, "model.attention_dropout": 0})
    assert difference(plain.losses(), single.losses()) > 1e-4


@pytest.mark.slow
def test_another_strategy_and_world_size_go_on(single, two_processes, train, difference, tmp_path):
    """zero2 on two processes to step 6, fsdp2 on three from there."""
    started = two_processes("started zero2")
    resumed = train(started.cut_after(6, tmp_path / "run").folder, "fsdp2", 3,
                    **{"train.checkpoint_every": 3, "train.micro_batch_size": 4})
    assert resumed.resumed_from() == ["step-00000006"]
    assert difference(resumed.losses(), single.losses()) <= 1e-5
    assert resumed.order() == single.order()
    assert resumed.checkpoint(9).state()["world_size"] == 3


@pytest.mark.slow
@pytest.mark.matrix  # for CI, test_silent_traps.py compiles blocks of a GPT
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_and_recomputed_blocks_change_nothing(strategy, single, train, difference, tmp_path):
    run = train(tmp_path / "run", strategy, **{"parallel.compile": "true", "parallel.activation_checkpointing": "full"})
    assert difference(run.losses(), single.losses()) <= 1e-5
