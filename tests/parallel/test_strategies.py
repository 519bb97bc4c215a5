"""The support matrix: what is refused names the combination and the nearest allowed one; all the rest is let through."""

from __future__ import annotations

from itertools import product

import pytest

from genscale.config import ParallelSettings
from genscale.errors import UserError
from genscale.parallel.strategies import ParallelPlan, check_combination

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
REFUSED = {
    **{("fp16", strategy, mode): "bf16" for strategy in ("zero1", "zero2", "zero3", "fsdp2")
       for mode in ("none", "full", "selective")},
    **{(precision, "zero3", "selective"): "full" for precision in ("fp32", "bf16")},
}


@pytest.mark.parametrize(("precision", "strategy", "checkpointing"),
                         list(product(("fp32", "bf16", "fp16"), STRATEGIES, ("none", "full", "selective"))))
def test_support_matrix(precision: str, strategy: str, checkpointing: str) -> None:
    plan = ParallelPlan(strategy, "none", precision, world_size=2)
    settings = ParallelSettings(activation_checkpointing=checkpointing)
    instead = REFUSED.get((precision, strategy, checkpointing))
    if instead is None:
        check_combination(plan, settings)
        return
    with pytest.raises(UserError, match=f"{strategy}.*use .*{instead}"):
        check_combination(plan, settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_shards_needs_a_group_for_one_process(strategy: str) -> None:
    assert ParallelPlan(strategy, "none", "fp32", 1).needs_group == (strategy not in ("single", "ddp"))
