"""The family `reward` as runs: from a trained GPT, at any micro-batch, cut and gone on, sampled; and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import genscale
from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.tensor_files import TensorFiles
from genscale.data.text.prompt_data import PromptData
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.inspection.comparison import compare_runs
from genscale.inspection.config_check import check_config
from genscale.rng import Draws
from genscale.settings.parser import load_config
from genscale.tracking.metrics_file import read_metrics

PROMPTS = ["The", "A b", "Names of", "Python", "If", "class", "A long one", "x"]
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{word} {n}", "answer": "e" * (n % 3)}) + "\n"
                            for n in range(6) for word in PROMPTS))
    return file


@pytest.fixture(scope="module")
def asked(prompts: Path) -> dict[str, Any]:
    """Settings of a run of four steps on prompts of many lengths."""
    return {
        "model.family": "reward", "data.source": prompts, "data.columns": "[answer]", "data.prompt_tokens": 16,
        "data.row_bytes": 96, "data.validation_prompts": 5, "data.validation_fraction": 0.3,
        "data.lanes": 4, "objective.tokens": 8, "objective.group": 4,
        "objective.rewards": '[{"name": "length", "target": 8}, {"name": "exact", "weight": 0.5}]', "objective.beta": 0.1,
        "train.steps": 4, "train.global_batch_size": 4, "train.precision": "fp32", "train.log_every": 1,
        "train.checkpoint_every": 2, "train.evaluate_every": 2, "optimizer.lr": 1e-3, "tracking.wandb": "disabled",
        "run.trace": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def start(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a trained GPT's run folder."""
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("start") / "gpt"))


@pytest.fixture(scope="module")
def tune(asked: dict[str, Any], start: Path, genscale: Train) -> Train:
    """`tune(folder, **settings)`: a run in that folder."""

    def run(folder: Path, **settings: Any) -> Any:
        place = {"run.dir": folder.parent, "run.name": folder.name, "model.from": start}
        return genscale("train", *(f"--{key}={value}" for key, value in {**asked, **place, **settings}.items()))

    return run


@pytest.fixture(scope="module")
def whole(tune: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run. To be read only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = tune(folder)
    assert done.code == 0, done.err
    return folder


def lines(run: Path) -> list[dict[str, Any]]:
    return list(read_metrics(run / "metrics.jsonl"))


def rewards(run: Path) -> list[float]:
    return [line["reward"] for line in lines(run) if "reward" in line]


def last(run: Path) -> Checkpoint:
    return Checkpoint(run / "checkpoints" / "step-00000004")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_it_begins_as_the_run_it_comes_from(whole: Path, start: Path) -> None:
    reference = Checkpoint(start / "checkpoints" / "step-00000006").tensors("networks", "gpt")
    kept = TensorFiles([whole / "frozen" / "reference.safetensors"])
    assert kept.shapes() == reference.shapes() and all(torch.equal(kept(key), reference(key)) for key in kept.shapes())
    first = next(line for line in lines(whole) if line["step"] == 1)
    assert first["divergence"] == pytest.approx(0, abs=1e-4)  # of the policy before the first update
    assert first["reward"] == pytest.approx(first["reward_length"] + 0.5 * first["reward_exact"], abs=1e-5)
    assert 1 <= first["length"] <= 8 and 0 <= first["cut"] <= 1 and first["entropy"] > 1 and 0 <= first["flat_groups"] <= 1


def test_what_is_evaluated(whole: Path) -> None:
    found = [line for line in lines(whole) if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 4]
    for line in found:
        assert line["validation_loss"] == pytest.approx(0.1 * line["validation_divergence"] - line["validation_reward"])
        assert {"validation_greedy_reward", "validation_gap", "validation_cut", "validation_length"} <= line.keys()
        assert line["validation_gap"] > -0.5


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_matter(tune: Train, whole: Path, tmp_path: Path, micro: int) -> None:
    assert tune(tmp_path / "run", **{"train.micro_batch_size": micro}).code == 0
    assert rewards(tmp_path / "run") == pytest.approx(rewards(whole), rel=1e-6)
    comparison = compare_runs(whole, tmp_path / "run")
    assert comparison.first is not None and "answer" not in comparison.first.what and comparison.beyond is None


def test_a_run_that_goes_on_needs_nothing_but_its_folder(tune: Train, whole: Path, tmp_path: Path, genscale: Train) -> None:
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(last(cut).path)
    gone = Path(load_config(FAMILIES, whole / "config.yaml").model.from_)
    moved = gone.rename(gone.with_name("moved"))
    try:
        assert tune(cut).code == 0
        assert last(cut).digest() == last(whole).digest()
        assert compare_runs(whole, cut).first is None
        assert len(genscale("sample", cut, "--prompt", "The", "--tokens", 3).out) >= len("The")
        evaluated = json.loads(genscale("evaluate", cut).out)
    finally:
        moved.rename(gone)
    assert evaluated["reward"] == pytest.approx(next(line["validation_reward"] for line in reversed(lines(whole))
                                                     if "validation_reward" in line))


def test_a_judge_may_move_and_must_stay_the_same(tune: Train, start: Path, tmp_path: Path, genscale: Train) -> None:
    judge, run = Path(shutil.copytree(start, tmp_path / "judge")), tmp_path / "run"

    def judged(place: Path) -> Any:
        judge = json.dumps([{"name": "likelihood", "run": str(place)}])
        return tune(run, **{"objective.rewards": judge, "data.columns": "[]", "objective.group": 2, "objective.tokens": 2,
                            "train.steps": 2, "train.checkpoint_every": 1, "train.evaluate_every": 0, "train.sample_every": 0,
                            "data.validation_prompts": 1, "run.trace": False})

    assert judged(judge).code == 0
    end = Checkpoint(run / "checkpoints" / "step-00000002")
    digest = end.digest()
    assert end.state()["judges"]["likelihood"]["origin"] == str(judge)
    moved = judge.rename(tmp_path / "elsewhere")
    shutil.rmtree(end.path)
    done = judged(moved)
    assert done.code == 0 and "elsewhere" in done.err and end.digest() == digest
    shutil.rmtree(moved / "checkpoints" / "step-00000006")
    (moved / "checkpoints" / "step-00000004").rename(moved / "checkpoints" / "step-00000006")  # trained otherwise
    why = f"objective.rewards: likelihood asks {moved}, which is not the network that judged what {run}"
    assert genscale("evaluate", run).message().startswith(why)
    with pytest.raises(UserError, match=re.escape(why)):  # and before a job is submitted
        check_config(load_config(FAMILIES, run / "config.yaml"), 1)
    shutil.rmtree(end.path)
    message = judged(moved).message_of_run()
    assert message.startswith(f"{why}/checkpoints/step-00000001 was trained on (SHA-256 differs from ")


def test_a_checkpoint_holds_no_more_of_the_reference_than_its_digest(whole: Path, start: Path) -> None:
    mine, plain = last(whole).path, start / "checkpoints" / "step-00000006"
    files = {file.relative_to(mine).as_posix() for file in mine.rglob("*.safetensors")}
    assert files and not [name for name in files if "reference" in name]
    assert size(mine) <= size(plain) + 512  # names, and nothing else, are longer
    assert set(last(whole).state()["frozen"]) == {"reference"}


def test_samples_show_their_rewards(whole: Path) -> None:
    shown = (whole / "samples" / "step-00000004.txt").read_text()
    assert shown.count("--- reward ") == 5 and "(length " in shown and "exact " in shown


def test_compare_names_the_first_token_that_is_another(whole: Path, tmp_path: Path) -> None:
    flipped = Path(shutil.copytree(whole, tmp_path / "flipped"))
    records = [json.loads(line) for line in (flipped / "trace.jsonl").read_text().splitlines()]
    records[3]["made"]["policy/answers"]["9"][2][1] = 255
    (flipped / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    comparison = compare_runs(whole, flipped)
    assert comparison.first is not None and comparison.first.what.startswith("sample 9, answer 2, token 1: ")
    assert "first difference at step 3: sample 9, answer 2, token 1" in comparison.verdict


def test_a_rollout_of_the_dry_batch_is_the_longest_there_can_be(whole: Path) -> None:
    class Told(Draws):
        rehearsal = True

        def made(self, what: str, tokens: torch.Tensor) -> None:
            assert tokens.shape == (2, 4, 8) and (tokens >= 0).all()
            told.append(what)

    told: list[str] = []
    config = load_config(FAMILIES, whole / "config.yaml")
    objective = family("reward").restore(config, whole)
    for network in objective.networks.values():
        network.to_empty(device="cpu").initialise(1)
    samples = PromptData(config.data, 1, for_training=False).validation()[:2]
    batch = {name: torch.stack([torch.from_numpy(sample[name]) for sample in samples]) for name in samples[0]}
    batch = {"prompt": batch["prompt"].long(), "row": torch.zeros_like(batch["row"]), "sample": torch.arange(2)}
    terms = objective.loss(objective.networks, batch, Told(1, "policy", 1, batch["sample"]))
    assert told == ["answers"] and terms["length"] == 2 * 4 * 8 and terms["reward"] == 0


@pytest.mark.parametrize("written", ["[" * 100_000, '[{"prompt": "x", "row": []}]', '[{"prompt": [1e999], "row": [1]}]',
                                     '[{"prompt": [[1]], "row": [1]}]', '[{"prompt": TOKENS, "row": [91]}]', "[5]"],
                         ids=range(6))
def test_prompts_of_a_strangers_making_are_refused(whole: Path, tmp_path: Path, written: str) -> None:
    (tmp_path / "prompts.json").write_text(written.replace("TOKENS", str([1] * 16)))
    config = load_config(FAMILIES, whole / "config.yaml")
    with pytest.raises(UserError, match=r"prompts.json: is not what genscale writes there; delete it"):
        family("reward").restore(config, tmp_path)
    kept = json.loads((whole / "prompts.json").read_text())
    kept[0]["prompt"][-1] = 10**6
    (tmp_path / "prompts.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match="prompts.json"):
        family("reward").restore(config, tmp_path)


@pytest.mark.parametrize(("settings", "why"), [
    ({"objective.group": 1}, "objective.group: 1 answer to a prompt has no other to be compared with; nearest allowed: 2"),
    ({"model.dropout": 0.1}, "model.dropout: 0.1 would draw an answer from one network and reward another; nearest allowed: 0"),
    ({"train.precision": "fp16"}, "train.precision: fp16"),
    ({"objective.tokens": 20}, "objective.tokens: 20 after data.prompt_tokens 16 are more than model.positions 32"),
    ({"data.columns": "[]"}, "data.columns: [] has not 'answer', which objective.rewards read; set data.columns to ['answer']"),
    ({"objective.rewards": "[]"}, "objective.rewards: names no reward"),
    ({"model.from": "null"}, "model.from: missing"),
    ({"model.layers": 7}, "has another shape than model.layers 7 (there 2)"),
])
def test_what_is_refused(tune: Train, tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    assert why in tune(tmp_path / "refused", **settings).message()


def test_what_a_run_can_and_cannot_start_from(tune: Train, whole: Path, tmp_path: Path, genscale: Train) -> None:
    assert tune(tmp_path / "again", **{"model.from": last(whole).path, "train.steps": 1}).code == 0  # one of its own kind
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    assert f"model.from: {other}: no checkpoint here" in tune(tmp_path / "none", **{"model.from": other}).message()
    points = {"model.family": "points", "train.steps": 1, "run.dir": tmp_path, "run.name": "points",
              "tracking.wandb": "disabled"}
    assert genscale("train", *(f"--{key}={value}" for key, value in points.items())).code == 0
    message = tune(tmp_path / "none", **{"model.from": tmp_path / "points"}).message()
    assert "a run of model.family points, which writes no text" in message and "set model.family: image_reward" in message


def test_an_evaluation_that_was_cut_short_asks_for_the_rest_only(asked: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """Judged by dice, and stopped in the middle of the evaluation at step 2."""
    stop_at, said = 2 * 16, 0

    def dice(answers: list[genscale.Answer]) -> list[float]:
        nonlocal said
        if said == stop_at:
            signal.raise_signal(signal.SIGTERM)
        said += len(answers)
        return [int.from_bytes(os.urandom(2)) / 2**16 for _ in answers]

    own = {"objective.rewards": "[{name: dice}]", "data.columns": "[]", "train.steps": 3, "train.sample_every": 0,
           "run.trace": False, "run.dir": tmp_path, "run.name": "run", "model.from": start}
    config = genscale.config("reward", {key: value for key, value in {**asked, **own}.items() if key != "model.family"})
    stopped = genscale.train(config, rewards={"dice": dice})
    assert stopped.stopped_by == signal.SIGTERM and stopped.step == 2 and said > stop_at
    assert genscale.train(config, rewards={"dice": dice}).step == 3
    records = [json.loads(line) for line in (stopped.folder / "rewards-00000.jsonl").read_text().splitlines()]
    addresses = [tuple(each[key] for key in ("scope", "step", "sample", "member")) for each in records]
    assert len(set(addresses)) == len(addresses) == said, "nobody was asked twice"
    assert {(scope, step) for scope, step, *_ in addresses if scope == "greedy"} == {("greedy", 2), ("greedy", 3)}


def test_who_only_writes_needs_no_judge(asked: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """A script's own reward is not known to who loads its run afterwards."""
    own = {"objective.rewards": "[{name: mine}]", "data.columns": "[]", "train.steps": 1, "train.evaluate_every": 0,
           "train.checkpoint_every": 0, "run.trace": False, "run.dir": tmp_path, "run.name": "run", "model.from": start}
    config = genscale.config("reward", {key: value for key, value in {**asked, **own}.items() if key != "model.family"})
    folder = genscale.train(config, rewards={"mine": lambda answers: [float(len(answer.text)) for answer in answers]}).folder
    model = genscale.load(folder)
    assert model.networks["policy"](torch.ones(1, 3, dtype=torch.int64)).shape[1] == 3
    with pytest.raises(UserError, match="'mine' is not one of"):
        model.sample(seed=0)
