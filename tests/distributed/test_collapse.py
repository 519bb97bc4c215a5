"""A sharded run that goes back to its best checkpoint trains on with those weights."""

from __future__ import annotations

import pytest
import torch

SETTINGS = {"train.steps": 10, "train.evaluate_every": 4, "train.checkpoint_every": 2, "train.checkpoint_keep": 100,
            "train.collapse": "restore", "train.collapse_factor": 0.01, "train.collapse_patience": 1, "train.ema_half_life": 24,
            "train.ema_ramp_up": 0, "optimizer.lr": 1e-2, "schedule.warmup_steps": 2}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "precision"), [
    ("fsdp2", "fp32"), *(pytest.param(*case, marks=pytest.mark.matrix) for case in (
        ("ddp", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16"), ("zero3", "fp32"),
        ("fsdp2", "bf16")))])  # fmt: skip
def test_a_restored_run_trains_on_from_the_average_of_its_best_checkpoint(strategy, precision, train, tmp_path, difference):
    """The evaluation of step 8 is made to look bad; steps 9 and 10 are then those of one process that starts from there."""
    run = train(tmp_path / "run", strategy, **{**SETTINGS, "train.precision": precision})
    best, after = run.checkpoint(4), run.checkpoint(8)
    for kind, source in (("networks", "averages"), ("averages", "averages"), ("optimizers", "optimizers")):
        found, wanted = after.tensors(kind, "gpt"), best.tensors(source, "gpt")
        for key in wanted.keys():  # noqa: SIM118 - no dict
            torch.testing.assert_close(found(key), wanted(key), rtol=0, atol=0)
    run.cut_after(8)
    alone = train(tmp_path / "run-cut", "single", processes=1,
                  **{**SETTINGS, "train.precision": precision, "train.collapse": "ignore"})
    assert alone.resumed_from()[-1] == "step-00000008"
    # In bf16 strategies round at other places; weights that had not gone back would be a tenth better.
    assert difference(run.losses()[8:], alone.losses()[8:]) < (1e-5 if precision == "fp32" else 2e-2)
    assert run.values("collapses") == [1, 2]
