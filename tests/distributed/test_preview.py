"""Text drawn while training, keys and values kept, by networks that are spread over processes."""

from __future__ import annotations

import pytest
import torch

from genscale.objectives import FAMILIES
from genscale.settings.parser import load_config
from genscale.verbs.trained import load_weights


@pytest.mark.parametrize(("strategy", "positions"), [
    ("fsdp2", 256), pytest.param("zero3", 40, marks=pytest.mark.slow),
    *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.matrix]) for case in (("fsdp2", 40), ("zero3", 256))),
])  # fmt: skip
def test_a_sharded_network_writes_what_its_checkpoint_writes_in_one_process(strategy, positions, train, tmp_path):
    """200 tokens: within 256 positions from the cache alone, in 40 with a window that slides for most of them."""
    run = train(tmp_path / "run", strategy, **{"train.steps": 3, "model.positions": positions, "optimizer.lr": 1e-2,
                                               "schedule.warmup_steps": 0, "model.init_std": 0.2})
    checkpoint = run.checkpoint(3)
    objective = FAMILIES["gpt"].restore(load_config(FAMILIES, checkpoint.path / "config.yaml"), run.folder)
    device = load_weights(objective, checkpoint)
    text = objective.preview(objective.networks, 1337, device)
    assert (run.folder / "samples" / "step-00000003.txt").read_text() == text
    assert len(set(text)) > 10 and torch.is_grad_enabled()
