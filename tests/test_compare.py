"""Differences planted between two runs, each named rightly by `genscale compare`; equal runs called equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from genscale.data.loader import StepLoader
from genscale.families import FAMILIES, family
from genscale.families.gpt.objective import LanguageModel
from genscale.settings.parser import load_config

STEPS = 4
GAN = {"model": {"family": "dcgan", "width": 4, "latent": 4},
       "data": {"source": "digits", "size": 16, "channels": 1, "validation_images": 80},
       "objective": {"discriminator_steps": 2}, "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4}}


@pytest.fixture(scope="module")
def make(tiny_settings, genscale, tmp_path_factory) -> Callable[..., Path]:
    """`make({"train": {"steps": 3}})`: a run with these settings besides, traced; returns its folder."""
    folder = tmp_path_factory.mktemp("compared")
    text = folder / "text.txt"  # short enough that a few steps read all of it
    text.write_text(Path(tiny_settings["data"]["source"]).read_text()[:900])

    def run(change: dict[str, Any] | None = None, start: Callable[..., Any] = genscale) -> Path:
        name = f"run-{len(list(folder.glob('run-*')))}"
        settings = {**tiny_settings, "data": {**tiny_settings["data"], "source": str(text), "validation_blocks": 2},
                    "train": {**tiny_settings["train"], "steps": STEPS}, "run": {"trace": True}}
        if "model" in (change or {}) and "family" in change["model"]:
            settings = {"tracking": tiny_settings["tracking"], "run": {"trace": True}, "model": {}, "data": {},
                        "train": tiny_settings["train"]}
        for section, values in (change or {}).items():
            settings[section] = {**settings.get(section, {}), **values}
        settings["schedule"] = {"name": "constant"}
        settings["run"] |= {"name": name, "dir": str(folder)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        done = start("train", "--config", folder / f"{name}.yaml")
        assert done.code == 0, done.err
        return folder / name

    return run


@pytest.fixture(scope="module")
def base(make) -> Path:
    return make()


@pytest.fixture
def verdict(genscale, base) -> Callable[..., str]:
    """The last line of `genscale compare`, which must end with this exit code."""

    def compare(other: Path, code: int, one: Path = base) -> str:
        for a, b in ((one, other), (other, one)):
            done = genscale("compare", a, b)
            assert done.code == code, done.out + done.err
        return genscale("compare", one, other).out.splitlines()[-1]

    return compare


def untraced(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    (folder / "trace.jsonl").unlink()
    return folder


def test_the_same_run_twice_is_equal_and_so_is_one_of_smaller_micro_batches_up_to_rounding(make, verdict) -> None:
    assert verdict(make(), 0) == f"equal for {STEPS} steps"
    said = verdict(make({"train": {"micro_batch_size": 2}}), 0)
    assert said.startswith("equal but for rounding: from step 1 on (")
    assert said.endswith("settings that differ: train.micro_batch_size None and 2")


def test_seed(make, verdict) -> None:
    said = verdict(make({"run": {"seed": 7}}), 1)
    assert said.startswith("first difference at step 0: initial weights of gpt: ")
    assert said.endswith("settings that differ: run.seed 1337 and 7")


def batches(config: Any, source: Path | str) -> list[torch.Tensor]:
    """Tokens of the global batches, from the data alone."""
    data = family("gpt").build_data(replace(config.data, source=str(source)), config.run.seed)
    loader = StepLoader(data, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, workers=0, prefetch_steps=1)
    try:
        return [loader.next_batch()[0]["tokens"] for _ in range(STEPS)]
    finally:
        loader.close()
        data.close()


def test_one_changed_character_is_a_batch_of_the_step_that_reads_it(make, base, verdict, tmp_path) -> None:
    config = load_config(FAMILIES, base / "config.yaml")
    text, changed = Path(config.data.source).read_text(), tmp_path / "text.txt"
    before, read_in = batches(config, config.data.source), 0
    for place in range(50, len(text), 50):
        changed.write_text(text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :])
        differing = [not torch.equal(a, b) for a, b in zip(before, batches(config, changed), strict=True)]
        if any(differing) and not differing[0]:
            read_in = differing.index(True) + 1
            break
    assert read_in > 1
    said = verdict(make({"data": {"source": str(changed)}}), 1)
    assert said.startswith(f"first difference at step {read_in}: batch (sample order or content)")


def test_learning_rate(make, verdict) -> None:
    said = verdict(make({"optimizer": {"lr": 0.0011}}), 1)
    assert said.startswith("first difference at step 1: learning rate 0.001 and 0.0011; settings that differ: optimizer.lr 0")


def test_one_initial_weight(make, verdict, monkeypatch) -> None:
    drawn = LanguageModel.initial_weights

    def planted(self: LanguageModel, name: str) -> Callable[[str], torch.Tensor]:
        read = drawn(self, name)

        def change(key: str) -> torch.Tensor:
            value = read(key).clone()
            if key == "layers.0.mlp.up.weight":
                value.view(-1)[77] += 1e-7
            return value

        return change

    monkeypatch.setattr(LanguageModel, "initial_weights", planted)
    said = verdict(make(), 1)
    assert said.startswith("first difference at step 0: initial weights of gpt: tensor layers.0.mlp.up.weight, relative diff")


def test_dropout(make, verdict) -> None:
    said = verdict(make({"model": {"dropout": 0.1}}), 1)
    assert said == "first difference at step 1: draws (noise, dropout); settings that differ: model.dropout 0.0 and 0.1"


def test_a_small_effect_of_another_setting_is_not_called_rounding(make, verdict) -> None:
    """A hundredth more decay moves the weights by a millionth in a step."""
    said = verdict(make({"optimizer": {"weight_decay": 0.101}}), 1)
    assert said.startswith("first difference at step 1: weights of gpt: ")
    assert said.endswith("settings that differ: optimizer.weight_decay 0.1 and 0.101")


@pytest.mark.slow
def test_two_networks_are_told_apart(make, verdict) -> None:
    one = make(GAN)
    assert verdict(make(GAN), 0, one) == "equal for 2 steps"
    said = verdict(make({**GAN, "optimizer": {"betas": [0.6, 0.9]}}), 1, one)
    assert said.startswith("first difference at step 1: ")
    lines = [json.loads(line) for line in (one / "trace.jsonl").read_text().splitlines()]
    assert list(lines[0]) == ["step", "weights"] and set(lines[0]["weights"]) == {"generator", "discriminator"}
    assert list(lines[1]["gradients"]) == ["discriminator", "generator", "discriminator, update 2"]


def test_without_a_trace_by_what_was_logged_and_by_checkpoints(make, base, verdict, tmp_path) -> None:
    plain = untraced(base, tmp_path / "plain")
    assert verdict(plain, 0) == f"equal for {STEPS} steps"
    other = untraced(make({"train": {"log_every": 3}, "optimizer": {"weight_decay": 0.2}}), tmp_path / "other")
    said = verdict(other, 1)
    assert said.startswith("first difference at step 3: loss ") and "no step" not in said
    # A checkpoint alone that differs, in one weight.
    file = next((plain / "checkpoints" / "step-00000002" / "networks").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["final_norm.weight"][3] += 0.25
    save_file(tensors, file)
    manifest = file.parents[1] / "manifest.json"
    content = json.loads(manifest.read_text())
    from genscale.checkpoint.checkpoints import sha256_of

    content["files"]["networks/" + file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    manifest.write_text(json.dumps(content))
    said = verdict(plain, 1)
    assert said.startswith("first difference in the checkpoints of step 2: 1 of ")
    assert "most final_norm.weight (weights of gpt): largest absolute difference 2.5e-01, relative 4.4e-02" in said


def test_an_interrupted_run_leaves_the_trace_of_one_that_never_stopped(make, base, genscale) -> None:
    """Lines after the checkpoint that a run goes on from are written again, and the same."""
    run = make()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    again = genscale("train", "--config", run / "config.yaml")
    assert again.code == 0, again.err
    assert (run / "trace.jsonl").read_text() == (base / "trace.jsonl").read_text()


def test_json_and_runs_of_other_lengths(make, base, genscale) -> None:
    longer = make({"train": {"steps": STEPS + 2}})
    done = genscale("compare", base, longer, "--json")
    content = json.loads(done.out)
    assert done.code == 0 and content["alike"] and content["compared"] == STEPS and content["ends"] == [STEPS, STEPS + 2]
    assert content["verdict"].startswith(f"equal for {STEPS} steps; one run goes on to step {STEPS + 2}")
    assert content["config"] == {"train.steps": [STEPS, STEPS + 2]}


def test_what_cannot_be_compared_is_one_line(base, genscale, tmp_path) -> None:
    assert genscale("compare", base, tmp_path / "none").message().endswith(
        "none is no run folder (which holds config.yaml and metrics.jsonl)")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(base / "config.yaml", empty)
    assert genscale("compare", base, empty).message().endswith("empty has no step in metrics.jsonl; compare runs that trained")
    config = yaml.safe_load((empty / "config.yaml").read_text())
    (empty / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"family": "vae"}}))
    assert "is a run of family gpt and" in genscale("compare", base, empty).message()
    (empty / "config.yaml").write_text(yaml.safe_dump(config))
    (empty / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    assert "have no step in common in metrics.jsonl: steps 1 to 4 and 99 to 99" in genscale("compare", base, empty).message()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(strategy, marks=pytest.mark.matrix)
                                                 for strategy in ("ddp", "zero2", "zero3"))])  # fmt: skip
def test_strategies_differ_by_rounding_alone(make, base, verdict, genscale_group, strategy) -> None:
    said = verdict(make({"parallel": {"strategy": strategy}}, genscale_group), 0)
    assert said.startswith("equal but for rounding: from step 1 on (loss "), said
    assert said.endswith(f"settings that differ: parallel.strategy auto and {strategy}")
