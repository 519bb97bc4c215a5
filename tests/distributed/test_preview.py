"""Text drawn while training, keys and values kept, by networks that are spread over processes."""

from __future__ import annotations

import pytest
import torch

from genscale.families import FAMILIES, family
from genscale.settings.parser import load_config
from genscale.testing.runs import Run
from genscale.verbs.trained import load_weights


def test_a_sharded_network_writes_what_its_checkpoint_writes_in_one_process(quick_runs):
    """200 tokens, within 256 positions: from the cache alone."""
    check_sample(quick_runs["preview"])


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "positions"), [("zero3", 170), *(
    pytest.param(*case, marks=pytest.mark.matrix) for case in (("zero3", 40), ("fsdp2", 40), ("zero3", 256)))])  # fmt: skip
def test_so_does_one_whose_window_slides(strategy, positions, train, tmp_path):
    """Which it does in 40 positions for most of the tokens, each of which then gathers the network; in 170 for the last 30."""
    check_sample(train(tmp_path / "run", strategy, **{"train.steps": 3, "model.positions": positions, "optimizer.lr": 1e-2,
                                                      "schedule.warmup_steps": 0, "model.init_std": 0.2}))


def check_sample(run: Run) -> None:
    checkpoint = run.checkpoint(3)
    objective = family("gpt").restore(load_config(FAMILIES, checkpoint.path / "config.yaml"), run.folder)
    device = load_weights(objective, checkpoint)
    text = objective.preview(objective.networks, 1337, device)
    assert (run.folder / "samples" / "step-00000003.txt").read_text() == text
    assert len(set(text)) > 10 and torch.is_grad_enabled()
