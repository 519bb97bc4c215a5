"""The family `reward` spread over processes: the same texts and rewards under every strategy; killed, and gone on to the same
bits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genscale.checkpoint.checkpoints import Checkpoint, latest_valid
from genscale.inspection.comparison import compare_runs
from genscale.testing.processes import GENSCALE, group, run, start
from genscale.testing.workers import WHOLE_RUNS
from genscale.tracking.metrics_file import read_metrics

STEPS = 8
SETTINGS = {
    "model.family": "reward", "model.from": "scratch", "model.preset": "llama", "model.layers": 2, "model.heads": 4,
    "model.width": 64, "model.positions": 32, "model.init_std": 0.05, "data.source": "PROMPTS", "data.columns": "[answer]",
    "data.prompt_tokens": 12, "data.row_bytes": 96, "data.validation_prompts": 6, "data.lanes": 4, "objective.tokens": 12,
    "objective.group": 4, "objective.beta": 0.05,
    "objective.rewards": '[{"name": "regex", "pattern": "[ -~]{2}", "where": "anywhere"}]',
    "train.steps": STEPS, "train.global_batch_size": 8, "train.checkpoint_every": 4, "train.evaluate_every": 4,
    "optimizer.name": "sgd", "optimizer.lr": 0.01, "run.trace": True, "train.precision": "fp32", "train.log_every": 1,
    "tracking.wandb": "disabled",
}  # fmt: skip
Once = Callable[[str, Callable[[Path], Any]], Path]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(once: Once) -> dict[str, Any]:
    prompts = "".join(json.dumps({"prompt": "+".join("1" * (n % 5 + 1)), "answer": str(n)}) + "\n" for n in range(80))
    folder = once("prompts", lambda folder: (folder / "prompts.jsonl").write_text(prompts))
    return {**SETTINGS, "data.source": str(folder / "prompts.jsonl")}


def words(folder: Path, strategy: str, settings: dict[str, Any]) -> list[object]:
    place = {"run.dir": folder.parent, "run.name": folder.name, "parallel.strategy": strategy}
    return ["train", *(f"--{key}={value}" for key, value in {**settings, **place}.items())]


def train(folder: Path, strategy: str, settings: dict[str, Any]) -> Path:
    command = group(1 if strategy == "single" else 2, *GENSCALE[1:])
    done = run(*words(folder, strategy, settings), command=command, timeout=400)
    assert done.code == 0, done.error
    return folder


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], once: Once) -> Path:
    return once("alone", lambda folder: train(folder / "run", "single", settings)) / "run"


def rewards(run: Path) -> list[float]:
    return [line["reward"] for line in read_metrics(run / "metrics.jsonl") if "reward" in line]


@pytest.fixture(scope="module")
def spread_runs(settings: dict[str, Any], begun: dict[str, Any], answers: Any) -> dict[str, Path]:
    """Runs on two processes by strategy, in one start of them: `<strategy>`, of `settings`; `<strategy> begun`, of `begun`; and
    `<strategy> again`, a copy of that which was cut after step 4 and goes on."""
    variants: dict[str, Any] = {}
    for strategy in STRATEGIES:
        place = {"parallel.strategy": strategy}
        variants[strategy] = {"settings": {**settings, **place, "train.micro_batch_size": 2}}
        if strategy != "zero1":
            variants[f"{strategy} begun"] = {"settings": {**begun, **place}}
            variants[f"{strategy} again"] = {"settings": {**begun, **place}, "again_from": [f"{strategy} begun", 4]}
    return {name: Path(folder) for name, folder in answers(WHOLE_RUNS, variants).items()}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_texts_and_rewards(alone: Path, spread_runs: dict[str, Path], strategy: str) -> None:
    spread = spread_runs[strategy]
    assert rewards(spread) == pytest.approx(rewards(alone), rel=1e-6)
    comparison = compare_runs(alone, spread)
    assert comparison.beyond is None, comparison.verdict  # not one token is another
    names = {file.name.split("-0")[0].removesuffix(".safetensors") for file in (spread / "checkpoints").rglob("*.safetensors")}
    assert names == {"policy"}


@pytest.fixture(scope="module")
def begun(settings: dict[str, Any], once: Once) -> dict[str, Any]:
    """Settings of a run that begins from a trained GPT and is judged by another: nothing of either is drawn."""

    def make(folder: Path) -> None:
        text = folder / "text.txt"
        text.write_text("\n\n".join("+".join("1" * (n % 5 + 1)) + f"={n}" for n in range(400)))
        gpt = {key: value for key, value in settings.items() if key.startswith(("model.", "train.", "tracking."))}
        gpt |= {"model.family": "gpt", "data.source": text, "data.sequence_length": 32, "data.validation_blocks": 2}
        del gpt["model.from"]
        for seed in (1, 2):
            train(folder / f"gpt-{seed}", "single", {**gpt, "run.seed": seed})

    folder = once("trained", make)
    shape = ("model.preset", "model.layers", "model.heads", "model.width", "model.positions", "model.init_std")
    judged = [{"name": "likelihood", "run": str(folder / "gpt-2")}, {"name": "length", "target": 4}]
    return {**{key: value for key, value in settings.items() if key not in shape}, "model.from": str(folder / "gpt-1"),
            "objective.rewards": json.dumps(judged)}


def same_bits(one: Path, other: Path) -> bool:
    last = f"step-{STEPS:08d}"
    digests = {Checkpoint(folder / "checkpoints" / last).digest() for folder in (one, other)}
    return len(digests) == 1 and compare_runs(one, other).first is None


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_run_that_was_cut_goes_on_to_the_same_bits(spread_runs: dict[str, Path], strategy: str) -> None:
    whole, again = spread_runs[f"{strategy} begun"], spread_runs[f"{strategy} again"]
    assert "continuing from" in (again / "logs" / "rank-00000.log").read_text()
    assert same_bits(whole, again)


@pytest.mark.parametrize("strategy", [
    "zero3", *(pytest.param(strategy, marks=pytest.mark.matrix) for strategy in ("ddp", "zero2", "fsdp2"))])
def test_killed_and_gone_on(begun: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    settings = begun
    whole, killed = train(tmp_path / "whole", strategy, settings), tmp_path / "killed"
    begun = start(*words(killed, strategy, settings), command=group(2, *GENSCALE[1:]))
    while begun.process.poll() is None and not list((killed / "checkpoints").glob("step-*/manifest.json")):
        time.sleep(0.01)
    begun.kill()
    begun.finish()
    assert latest_valid(killed / "checkpoints", lambda line: None) is not None
    train(killed, strategy, settings)
    assert same_bits(whole, killed)


def test_a_checkpoint_moves_to_another_number_of_processes(settings: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(alone, tmp_path / "run"))
    shutil.rmtree(moved / "checkpoints" / f"step-{STEPS:08d}")
    train(moved, "fsdp2", settings)
    assert rewards(moved) == pytest.approx(rewards(alone), rel=1e-6)
