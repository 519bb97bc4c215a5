"""Every file in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genscale.data.text.tokenizers import ByteTokenizer
from genscale.families import FAMILIES, family
from genscale.families.gpt.network import GPT
from genscale.objectives.capabilities import BeginsFromRun
from genscale.settings.parser import load_config
from genscale.supervise.run_folder import config_yaml
from genscale.training.setup import derive_accumulation

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_parses_and_builds(path, tmp_path):
    config = load_config(FAMILIES, path)
    assert config.run.name != "run", "each config names its run"
    derive_accumulation(config.train, 1)
    if family(config.model.family).can(BeginsFromRun):  # there is none here
        return
    if config.model.family == "gpt" and not Path(ROOT, config.data.tokenizer).exists():
        ByteTokenizer().save(tmp_path / "tokenizer.json")  # stands in for one that has to be fetched
    with torch.device("meta"):  # shapes, not memory
        objective = family(config.model.family).restore(config, tmp_path)
    assert sum(p.numel() for network in objective.networks.values() for p in network.parameters()) > 0


def test_columns_of_filters_may_be_called_as_python_calls_its_own(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {from: somewhere}\ndata: {filters: {class: toxic, from: web}}\n")
    config = load_config(FAMILIES, file)
    assert config.model.from_ == "somewhere" and config.data.filters == {"class": "toxic", "from": "web"}
    file.write_text(config_yaml(config))  # as the run folder keeps it
    assert load_config(FAMILIES, file) == config and "from: somewhere" in file.read_text()


def test_the_demo_runs(genscale, tmp_path):
    """Its first two steps; `launch/quickstart.sh` runs all of it."""
    arguments = ["--train.steps", 2, "--train.global_batch_size", 8, "--run.dir", tmp_path, "--data.validation_blocks", 2]
    outcome = genscale("train", "--config", ROOT / "configs/gpt/demo.yaml", *arguments)
    assert outcome.code == 0, outcome.err
    assert "bits per byte" in outcome.out and (tmp_path / "demo" / "checkpoints" / "step-00000002").is_dir()


GPT2_ROWS = 50304 - 50257  # of the embedding, added so that matrix kernels have whole tiles
COUNTS = {  # parameters of the released models, to the last one
    "gpt2-124m": 124_439_808 + GPT2_ROWS * 768, "gpt2-355m": 354_823_168 + GPT2_ROWS * 1024,
    "gpt2-774m": 774_030_080 + GPT2_ROWS * 1280, "gpt2-1558m": 1_557_611_200 + GPT2_ROWS * 1600,
    "llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496,
}
GPT3_MILLIONS = {"125m": 125, "350m": 350, "760m": 760, "1.3b": 1_300, "2.7b": 2_700, "6.7b": 6_700, "13b": 13_000,
                 "175b": 175_000}


@pytest.mark.parametrize("name", [*COUNTS, *(f"gpt3-{size}" for size in GPT3_MILLIONS)])
def test_the_sizes_are_those_of_the_published_models(name):
    config = load_config(FAMILIES, ROOT / "configs" / "gpt" / f"{name}.yaml")
    with torch.device("meta"):
        network = GPT(config.model, config.model.vocab_size)
    if name in COUNTS:
        assert network.parameter_count() == COUNTS[name]
    else:  # the paper's table gives two or three digits
        assert network.parameter_count() == pytest.approx(GPT3_MILLIONS[name.removeprefix("gpt3-")] * 1e6, rel=0.025)
