"""Muon under every strategy where it is exact: it needs whole matrices, also where they are sharded."""

from __future__ import annotations

import pytest

MUON = {"name": "muon", "lr": 5e-3, "weight_decay": 0.1}
STEPS = 6
SHARES = {"ddp": 1.0, "fsdp2": 0.5}


@pytest.fixture(scope="module")
def spread(engines):
    return engines({strategy: {"strategy": strategy, "optimizer": MUON, "steps": STEPS, "clip": 1.0, "accumulation": 2}
                    for strategy in SHARES} |
                   {name: {"strategy": "ddp", "optimizer": {**MUON, "name": name}, "steps": STEPS, "count_operations": True}
                    for name in ("muon", "adamw")})


@pytest.fixture(scope="module")
def alone(worker):
    return worker.train_plainly(MUON, STEPS, clip=1.0)[0]


@pytest.mark.parametrize("strategy", SHARES)
def test_it_equals_one_process(strategy, spread, alone, difference):
    assert alone[-1] < 0.7 * alone[0], "nothing was learned: equal losses would mean little"
    assert difference([step["loss"] for step in spread[strategy]["steps"]], alone) < 1e-5


@pytest.mark.parametrize("strategy", SHARES)
def test_its_state_is_sharded(strategy, spread):
    whole = max(spread["ddp"]["bytes_at_rest"])
    for held in spread[strategy]["bytes_at_rest"]:
        assert held == pytest.approx(SHARES[strategy] * whole, rel=0.05)


def test_each_process_makes_its_share_of_the_matrices_orthogonal(spread):
    """Ten products of two matrices and a sum for each, of which two layers have twelve, query, key and value one by one; of
    the first step."""
    muon, adamw = (spread[name]["matrix_products"] for name in ("muon", "adamw"))
    assert muon - adamw == 10 * 12 / 2


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_it_resumes_bit_for_bit(strategy, train, tmp_path):
    settings = {"optimizer.name": "muon", "train.checkpoint_every": 5, "train.micro_batch_size": 3}
    straight = train(tmp_path / "straight", strategy, **settings)
    resumed = train(straight.cut_after(5).folder, strategy, **settings)
    assert resumed.resumed_from() == ["step-00000005"]
    assert resumed.losses() == straight.losses()
    assert resumed.checkpoint(10).digest() == straight.checkpoint(10).digest()
