"""The entry of a family: what it says it can do is looked for when a run begins, not after the training."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from genscale.errors import UserError
from genscale.evaluation.trained_run import TrainedRun
from genscale.families import FAMILIES, family
from genscale.families.entry import Family, Sampling, Scoring
from genscale.objectives.capabilities import EncodesImages, Generates, GeneratesImages, missing_members
from genscale.settings.parser import parse_config
from genscale.testing import toy


def module(**changed: object) -> SimpleNamespace:
    """The toy's functions, some of them others."""
    functions = {name: getattr(toy, name) for name in ("build_data", "validation", "build", "restore")} | changed
    return SimpleNamespace(__name__="toy", **{name: value for name, value in functions.items() if value is not None})


def known(monkeypatch: pytest.MonkeyPatch, **changed: object) -> Family:
    """The toy family, with an entry that differs in that."""
    entry = replace(toy.FAMILY, **changed)
    monkeypatch.setitem(FAMILIES.registered, "toy", entry)
    return entry


def test_a_family_without_a_sampler_writes_its_preview(monkeypatch, genscale, tmp_path, capsys):
    plain = Family(toy.ToySettings, toy.ToyDataSettings, toy.FAMILY.module)
    sample, objective = plain.sampling.load(), plain.restore(parse_config({"toy": plain}, ["--model.family=toy"]), tmp_path)

    def preview(networks, seed, device):
        return f"wave {seed}" if device.type == "cpu" else ""

    run = TrainedRun(objective, parse_config({"toy": plain}, ["--model.family=toy"]), tmp_path, torch.device("cpu"))
    monkeypatch.setattr(objective, "preview", preview)
    sample(run, plain.sampling.settings(seed=3))
    assert capsys.readouterr().out == "wave 3\n"
    with pytest.raises(UserError, match="--out: a.png, but a run of model.family toy makes text"):
        sample(run, plain.sampling.settings(out="a.png"))
    monkeypatch.setattr(objective, "preview", lambda *words: np.full((4, 6, 3), 7, np.uint8))
    sample(run, plain.sampling.settings())
    with Image.open(capsys.readouterr().out.strip()) as picture:
        assert picture.size == (6, 4) and picture.getpixel((0, 0)) == (7, 7, 7)


def test_every_family_is_found_by_its_name_and_has_what_its_entry_promises():
    assert [family(name).name for name in FAMILIES] == list(FAMILIES) == [
        "gpt", "dcgan", "points", "vae", "vae_gan", "reward", "image_reward"]
    with pytest.raises(UserError, match="model.family: 'vae-gan' is not one of gpt, dcgan, .* 'vae_gan'"):
        family("vae-gan")
    for name in FAMILIES:
        entry = family(name)
        entry.load()
        if entry.tiny_from is not None:  # tests/objectives/test_image_reward.py builds it from a run
            continue
        words = [f"--{key}={value}" for key, value in entry.tiny.items()]
        config = parse_config(FAMILIES, [f"--model.family={name}", "--train.global_batch_size=8", *words])
        objective = entry.build_objective(config, entry.build_data(config.data, 1))
        assert entry.can(EncodesImages) == hasattr(objective, "encode")
        assert entry.can(GeneratesImages) == hasattr(objective, "image_shape")


def test_the_members_of_a_capability_are_those_that_it_lists():
    assert missing_members(GeneratesImages, object()) == ["latent_shape", "image_shape", "class_names", "generate"]
    assert missing_members(Generates, SimpleNamespace(latent_shape=(2,), generate=print)) == []


@pytest.mark.parametrize(("changed", "message"), [
    ({"capabilities": (EncodesImages,)}, "family toy: ToyObjective has no encode, which its entry promises (EncodesImages)"),
    ({"sampling": Sampling(toy.ToySampling, lambda: toy.sample, needs=(GeneratesImages,))},
     "family toy: ToyObjective has no image_shape, class_names, which its sampling promises (GeneratesImages)"),
    ({"module": lambda: module(restore=None)}, "family toy: its module toy has no restore"),
    ({"sampling": Sampling(toy.ToySampling, lambda: importlib.import_module("genscale.no_such"))},
     "family toy: its sampling cannot be loaded (No module named 'genscale.no_such')"),
    ({"scoring": Scoring(toy.ToySampling, lambda: None)}, "family toy: its scoring loads None, which is no function"),
])  # fmt: skip
def test_a_family_that_lacks_what_it_promises_is_refused_before_the_first_step(changed, message, monkeypatch, genscale,
                                                                               tmp_path):
    known(monkeypatch, **changed)
    found = genscale("train", "--model.family", "toy", "--run.dir", tmp_path, "--tracking.wandb", "disabled").message()
    assert message in found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_phase_trains_a_network_that_there_is(monkeypatch):
    class Astray(toy.ToyObjective):
        def __init__(self, *words: object) -> None:
            super().__init__(*words)
            self.phases = [replace(self.phases[0], network="nett")]

    entry = known(monkeypatch, module=lambda: module(build=lambda config, data: Astray(toy.network_of(config), 0.5, 1)))
    config = parse_config(FAMILIES, ["--model.family=toy"])
    with pytest.raises(UserError, match="phase toy of Astray trains 'nett', which is none of its networks, net"):
        entry.build_objective(config, None)


@dataclass
class Nameless:
    width: int = 1


@pytest.mark.parametrize(("changed", "message"), [
    ({"model_settings": Nameless}, "Nameless does not say its name"),
    ({"data_settings": Nameless}, "family toy: Nameless has no workers"),
    ({"objective_settings": dict}, "objective_settings of a family: .*dict.* is no dataclass"),
    ({"sampling": Sampling(dict, lambda: toy.sample)}, "sampling.settings of a family: .*dict.* is no dataclass"),
])  # fmt: skip
def test_an_entry_that_is_none(changed, message):
    with pytest.raises(UserError, match=message):
        replace(toy.FAMILY, **changed)


def test_a_family_of_one_file_trains_samples_and_is_evaluated(monkeypatch, genscale, tmp_path):
    known(monkeypatch)
    settings = {"model": {"family": "toy"}, "run": {"dir": str(tmp_path)}, "tracking": {"wandb": "disabled"},
                "train": {"steps": 4, "global_batch_size": 8, "precision": "fp32"}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(settings))
    trained = genscale("train", "--config", tmp_path / "toy.yaml")
    assert trained.code == 0 and f"genscale sample {tmp_path}/run\n" in trained.out, trained.err
    sampled = genscale("sample", tmp_path / "run", "--count", 3)
    assert sampled.code == 0 and [len(line.split()) for line in sampled.out.splitlines()] == [toy.LENGTH] * 3
    evaluated = genscale("evaluate", tmp_path / "run")
    assert evaluated.code == 0 and '"loss"' in evaluated.out, evaluated.err
    assert "a run of model.family toy writes no text" in genscale("evaluate", tmp_path / "run", "--tasks", "arc").message()
    assert "--count" in genscale("sample", "--help").out


@pytest.mark.parametrize("name", [
    "genscale.families", "genscale.families.entry", *(f"genscale.testing.{name}" for name in (
        "processes", "runs", "training", "toy", "objectives")), pytest.param("genscale.testing", marks=pytest.mark.slow)])
def test_examples_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
