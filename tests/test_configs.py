"""Every file in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genscale.config_parser import load_config
from genscale.data.tokenizers import ByteTokenizer
from genscale.objectives import FAMILIES
from genscale.training.run import derive_accumulation

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_parses_and_builds(path, tmp_path):
    config = load_config(FAMILIES, path)
    assert config.run.name != "run", "each config names its run"
    derive_accumulation(config, 1)
    if not Path(ROOT, config.data.tokenizer).exists():
        ByteTokenizer().save(tmp_path / "tokenizer.json")  # stands in for one that has to be fetched
    with torch.device("meta"):  # shapes, not memory
        objective = FAMILIES[config.model.family].restore(config, tmp_path)
    assert sum(p.numel() for network in objective.networks.values() for p in network.parameters()) > 0


def test_the_demo_runs(genscale, tmp_path):
    """Its first two steps; `launch/quickstart.sh` runs all of it."""
    arguments = ["--train.steps", 2, "--train.global_batch_size", 8, "--run.dir", tmp_path, "--data.validation_blocks", 2]
    outcome = genscale("train", "--config", ROOT / "configs/gpt/demo.yaml", *arguments)
    assert outcome.code == 0, outcome.err
    assert "bits per byte" in outcome.out and (tmp_path / "demo" / "checkpoints" / "step-00000002").is_dir()
