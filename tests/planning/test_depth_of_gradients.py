"""A deep network is planned with the settings that it has at its depth, not those that its shallow ones would have."""

from __future__ import annotations

import pytest

import genscale
from genscale.planning.account import Machine
from genscale.planning.trace import plan_step


@pytest.mark.slow
def test_gradients_are_summed_as_often_as_at_the_full_depth():
    """Two to six blocks of this one are below the 1 GiB from which `auto` sums after every micro-batch; all are above."""
    shape = {"model.layers": 64, "model.width": 768, "model.heads": 12, "model.vocab_size": 256, "data.sequence_length": 64,
             "model.positions": 64, "train.global_batch_size": 64, "train.micro_batch_size": 1, "train.precision": "bf16",
             "parallel.strategy": "fsdp2", "parallel.activation_checkpointing": "full", "parallel.compile": False}
    step = plan_step(genscale.config("gpt/gpt2-1558m", shape), Machine("h100", 8, 8))
    reductions = sum(exchange.count for exchange in step.exchanges if exchange.name == "reduce_scatter")
    assert 4 * step.parameters > 2**30 and step.accumulation == 8
    assert reductions >= 8 * 64
