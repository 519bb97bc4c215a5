"""A codebook that moves with the data: declared, it is the same under every strategy; by the book, it is refused by name."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import genscale.models.moving_state
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.testing.processes import torchrun
from genscale.testing.runs import flags

WORKER = Path(__file__).with_name("moving_state_worker.py")
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
QUICK = {
    "ddp": {"resume_at": 3}, "by the book": {"layer": "Tutorial"}, "no dry batch": {"layer": "Tutorial", "dry_batch": False},
    "torch's norm": {"layer": "Normalised"}, "constant": {"layer": "Constant"}, "unsummed": {"layer": "Unsummed"},
    "replacing": {"layer": "Replacing"},
}  # fmt: skip
SLOW = {
    **{strategy: {"strategy": strategy, "resume_at": 3} for strategy in SHARDED},
    **{f"{strategy}, accumulation": {"strategy": strategy, "accumulation": 2} for strategy in ("ddp", *SHARDED)},
    **{f"{strategy}, by the book": {"strategy": strategy, "layer": "Tutorial"} for strategy in SHARDED},
    **{f"{strategy}, unsummed": {"strategy": strategy, "layer": "Unsummed"} for strategy in SHARDED},
}  # fmt: skip


@pytest.fixture(scope="module")
def worker(load_module):
    return load_module(WORKER)


@pytest.fixture(scope="module")
def alone(worker):
    """What one process makes of it, in one forward a step."""
    return worker.answer({}, Processes(), ParallelPlan("single", "none", "fp32", 1))


@pytest.fixture(scope="module")
def quick(answers):
    return answers(WORKER, QUICK)


@pytest.fixture(scope="module")
def slow(answers):
    return answers(WORKER, SLOW)


def check_same(found, alone, difference) -> None:
    assert difference(found["losses"], alone["losses"]) < 1e-5
    for kind in ("networks", "averages"):
        assert found[kind]["vae"].keys() == alone[kind]["vae"].keys()
        for name, value in alone[kind]["vae"].items():
            torch.testing.assert_close(found[kind]["vae"][name], value, rtol=1e-5, atol=1e-6,
                                       msg=lambda text, n=name: f"{n}: {text}")
    state = {key.removeprefix("quantiser."): value for key, value in found["networks"]["vae"].items()}
    assert torch.equal(state["codes"], state["totals"] / state["uses"].clamp(min=1e-5)[:, None]), "copies of several processes"
    assert set(found["apart"]) == {""}


def test_a_declared_codebook_is_the_same_on_two_processes_and_after_a_resume(quick, alone, difference) -> None:
    check_same(quick["ddp"], alone, difference)
    assert len(alone["losses"]) == 5 and alone["losses"][-1] != alone["losses"][0]


def test_and_in_two_micro_batches(worker, alone, difference) -> None:
    found = worker.answer({"accumulation": 2}, Processes(), ParallelPlan("single", "none", "fp32", 1))
    check_same(found, alone, difference)


def test_the_average_takes_over_or_averages_as_the_layer_says(alone) -> None:
    weights, average = alone["networks"]["vae"], alone["averages"]["vae"]
    for name in ("uses", "totals"):
        assert torch.equal(average[f"quantiser.{name}"], weights[f"quantiser.{name}"])
    assert not torch.equal(average["quantiser.codes"], weights["quantiser.codes"])


BY_THE_BOOK = ["network vae, tensor quantiser.codes (Tutorial)", "quantiser.uses", "quantiser.totals",
               "each of the 2 processes", "genscale.models.moving_state.MovingState"]


@pytest.mark.parametrize("name, words", [
    ("by the book", BY_THE_BOOK), ("no dry batch", BY_THE_BOOK),
    ("torch's norm", ["quantiser.norm.running_mean (BatchNorm1d)", "take genscale.models.batch_norm.BatchNorm"]),
    ("replacing", ["network vae, tensor quantiser.uses (Replacing)", "change it in place"])])
def test_what_nobody_declares_is_refused_before_the_first_step(name, words, quick) -> None:
    found = quick[name]
    assert found["losses"] == [] and len(found["refused"]) == 2 and len(set(found["refused"])) == 1
    assert all(word in found["refused"][0] for word in words), found["refused"][0]


def test_a_constant_needs_no_declaration(quick, worker) -> None:
    read = worker.Quantised("Constant").initial_weights("vae")
    for name in ("codes", "uses", "totals"):
        assert torch.equal(quick["constant"]["networks"]["vae"][f"quantiser.{name}"], read(f"quantiser.{name}"))


def test_one_process_may_train_what_is_not_declared(worker) -> None:
    found = worker.answer({"layer": "Tutorial"}, Processes(), ParallelPlan("single", "none", "fp32", 1))
    assert len(found["losses"]) == 5


def test_processes_that_have_come_apart_are_told_by_network_tensor_and_rank(quick) -> None:
    told = quick["unsummed"]["apart"]
    assert len(set(told)) == 1
    assert "network vae.quantiser.codes (process 1 against 0)" in told[0] and "no checkpoint is written" in told[0]
    assert "encoder" not in told[0], "gradients are averaged, whatever codes they come from"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SLOW if name.split(", ")[-1] in ("accumulation", *SHARDED)])
def test_a_declared_codebook_is_the_same_under_every_strategy(name, slow, alone, difference) -> None:
    check_same(slow[name], alone, difference)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_and_in_groups(strategy, answers, alone, difference) -> None:
    groups = {"strategy": strategy, "shard_size": 2, "resume_at": 3}
    check_same(answers(WORKER, {"groups": groups}, processes=4)["groups"], alone, difference)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARDED)
def test_under_every_strategy_the_faults_are_found(strategy, slow) -> None:
    assert all(word in slow[f"{strategy}, by the book"]["refused"][0] for word in BY_THE_BOOK)
    assert "network vae.quantiser.codes (process 1 against 0)" in slow[f"{strategy}, unsummed"]["apart"][0]


def test_the_example_runs() -> None:
    result = doctest.testmod(genscale.models.moving_state)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{"parallel.strategy": "ddp"}, {"parallel.strategy": "fsdp2", "parallel.shard_size": 1}])
def test_a_run_whose_processes_come_apart_writes_no_checkpoint_of_it(spread, genscale_process, tmp_path) -> None:
    """Each looks at its own weights, and the checkpoint would hold some of each."""
    settings = {"model.family": "vae", "data.source": "digits", "data.size": 16, "data.channels": 1, "data.lanes": 12,
                "data.validation_images": 80, "train.steps": 6, "train.global_batch_size": 12, "train.checkpoint_every": 2,
                "train.precision": "fp32", "tracking.wandb": "disabled", "run.dir": tmp_path, "run.name": "run", **spread}
    done = genscale_process(WORKER.with_name("replicas_worker.py"), "train", *flags(settings), command=torchrun(2), timeout=200)
    assert done.code != 0
    assert "network vae.encoder.head.bias (process 1 against 0)" in done.err, done.err[-3000:]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
