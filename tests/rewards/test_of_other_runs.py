"""Rewards that ask another trained run."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

import genscale as library
from genscale.errors import UserError
from genscale.evaluation.classifier import RECIPE
from genscale.rewards.base import Answer
from genscale.rewards.collection import build_rewards
from genscale.settings.paths import paths_beside


def answer(prompt: str, text: str, ended: bool = True) -> Answer:
    return Answer(prompt, text, {}, ended, 0, 0)


def test_likelihood_is_that_of_the_run_whatever_is_read_beside(trained):
    rewards = build_rewards([{"name": "likelihood", "run": str(trained)}], "text")
    answers = [answer("The ", "end"), answer("", "of the "), answer("The ", "end", ended=False), answer("x" * 40, "y" * 40)]
    found = rewards.score(1, answers)[1]
    run = library.load(trained)
    network, end = run.networks["gpt"], run.objective.tokenizer.end_of_text
    for each, value in zip(answers[:3], found, strict=False):
        read = run.objective.tokenizer.encode(each.prompt) or [end]
        said = run.objective.tokenizer.encode(each.text) + [end] * each.ended
        tokens, targets = torch.tensor([read + said]), torch.tensor([[-1] * len(read) + said])
        with torch.no_grad():
            nats = network(tokens[:, :-1], targets=targets[:, 1:])
        assert value.item() == pytest.approx(-nats.item() / len(said), rel=1e-5)
    assert found[3] < 0, "the last of what is longer than the positions"
    assert [rewards.score(1, [each])[1].item() for each in answers] == found.tolist()


def test_a_run_that_may_go_on_must_be_named_with_its_step(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    with pytest.raises(UserError, match=r"rewards\[0\].step: .* is at step 4 of 6, .*; set step to 4, or finish that run"):
        build_rewards([{"name": "likelihood", "run": str(run)}], "text")
    build_rewards([{"name": "likelihood", "run": str(run), "step": 4}], "text")
    with pytest.raises(UserError, match=r"rewards\[0\].run: there is no run folder .*nowhere"):
        build_rewards([{"name": "likelihood", "run": str(tmp_path / "nowhere")}], "text")
    with pytest.raises(UserError, match=r"rewards\[0\].run: .*is one of model.family gpt, which makes no images"):
        build_rewards([{"name": "classifier", "run": str(run), "label": "3"}], "images")


def test_the_classifier_is_the_one_that_scores_the_runs_images(genscale, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "steps", 2)
    words = ("--model.family=vae", "--data.source=digits", "--data.size=8", "--data.channels=1", "--train.steps=1",
             "--tracking.wandb=disabled", f"--run.dir={tmp_path}", "--run.name=vae", "--model.width=8")
    done = genscale("train", *words)
    assert done.code == 0, done.err
    asked = {"name": "classifier", "run": str(tmp_path / "vae"), "label": "3"}
    rewards = build_rewards([asked, {**asked, "what": "probability"}], "images")
    (file,) = (tmp_path / "classifiers").iterdir()
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    parts, _ = rewards.score(1, images, torch.arange(64), torch.zeros(64))
    network = rewards._parts[0][1]._network
    with torch.no_grad():
        chances = network.head(network(images)).softmax(1)
    assert torch.equal(parts[:, 0], (chances.argmax(1) == 3).float()) and torch.allclose(parts[:, 1], chances[:, 3], atol=1e-6)
    before = file.stat().st_mtime_ns
    build_rewards([asked], "images")
    assert file.stat().st_mtime_ns == before, "trained once"
    with pytest.raises(UserError, match=r"rewards\[0\].label: 'three' is no class of the images of .*its classes are 0, 1, 2"):
        build_rewards([{**asked, "label": "three"}], "images")
    with pytest.raises(UserError, match=r"rewards\[0\].run: .*is one of model.family vae, which is no language model"):
        build_rewards([{"name": "likelihood", "run": str(tmp_path / "vae")}], "text")


def test_a_run_beside_a_config_is_found_there(tmp_path):
    (tmp_path / "judge").mkdir()
    content = yaml.safe_load("objective: {rewards: [{name: exact}, {name: likelihood, run: judge}]}")
    found = paths_beside({str(tmp_path / "run.yaml"): content}, [])
    assert found == {"objective.rewards": [{"name": "exact"}, {"name": "likelihood", "run": str(tmp_path / "judge")}]}
