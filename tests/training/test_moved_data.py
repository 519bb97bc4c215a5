"""A run goes on where its data lies elsewhere, bit for bit; with other content it does not, and is told what changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.plans import plan_differences
from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings
from genscale.testing.runs import Run

TEXT = {"sequence_length": 32, "validation_blocks": 8, "lanes": 4}


@pytest.fixture(params=["memory", "stream"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stream":
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    return request.param


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in Run(run).lines()}


def test_a_run_on_moved_text_and_tokenizer_is_the_run(genscale: Callable, tiny_settings: dict, tiny_text: Path,
                                                      tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "bytes"}}')
    (tmp_path / "held.txt").write_text("held out\n\n" * 50)
    settings = {**tiny_settings, "run": {"name": "tiny", "dir": str(tmp_path / "runs")}}
    names = {"source": tiny_text, "validation_source": tmp_path / "held.txt", "tokenizer": tmp_path / "tokenizer.json"}
    settings["data"] = settings["data"] | {name: str(file) for name, file in names.items()}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    assert genscale("train", "--config", tmp_path / "tiny.yaml", "--train.steps", 4).code == 0
    shutil.copytree(tmp_path / "runs", tmp_path / "moved" / "runs")
    for file in names.values():
        shutil.copyfile(file, tmp_path / "moved" / file.name)
    there = ["--config", tmp_path / "tiny.yaml", "--run.dir", tmp_path / "moved" / "runs"]
    there += [word for name, file in names.items() for word in (f"--data.{name}", tmp_path / "moved" / file.name)]
    stayed, moved = genscale("train", "--config", tmp_path / "tiny.yaml"), genscale("train", *there)
    assert stayed.code == moved.code == 0, moved.err
    assert f"data.source: '{tiny_text}' -> '{tmp_path}/moved/{tiny_text.name}'" in moved.err
    runs = [tmp_path / "runs" / "tiny", tmp_path / "moved" / "runs" / "tiny"]
    assert losses(runs[0]) == losses(runs[1]) and set(losses(runs[0])) == {1, 2, 3, 4, 5, 6}
    digests = [genscale("checkpoint", "digest", run / "checkpoints" / "step-00000006").out.split()[0] for run in runs]
    assert digests[0] == digests[1]
    (tmp_path / "held.txt").write_text("held odd\n\n" * 50)
    message = genscale("train", *there, "--data.validation_source", tmp_path / "held.txt").message_of_run()
    assert "the data is not what the checkpoint" in message and "validation_content (was " in message
    assert f"data.validation_source (was '{tmp_path}/moved/held.txt', now '{tmp_path}/held.txt')" in message


def edited(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[:-9] + b"another\n\n")


def test_plans_of_text_know_content_and_not_places(tmp_path: Path, kind: str) -> None:
    for number in range(3):
        (tmp_path / "a" / "more").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / ("more" if number else "") / f"{number}.txt").write_text(
            "".join(f"text {number} of some length, {line}\n\n" for line in range(99)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def plan(name: str) -> dict:
        return TextData(TextDataSettings(source=str(tmp_path / name), **TEXT), seed=1).plan()

    before = plan("a")
    assert before["source_order"] == kind and plan_differences(before, plan("b")) == []
    earlier = {key: value for key, value in before.items() if not key.endswith("probes")}  # as it was recorded before
    assert plan_differences(earlier, plan("a")) == plan_differences(earlier, plan("b")) == []
    edited(tmp_path / "b" / "more" / "1.txt")  # of the same size
    assert plan_differences(before, plan("b")) == (["source_content"] if kind == "memory" else ["source_probes"])
    assert plan_differences({**before, "seed": 2}, plan("a")) == ["seed"]


def test_plans_of_images_know_content_and_not_places(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "a" / ("test" if number % 3 == 0 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(folder / f"{number}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def plan(name: str) -> dict:
        return ImageData(ImageDataSettings(source=str(tmp_path / name), size=4, channels=1, labels=True, lanes=4), 1).plan()

    before = plan("a")
    assert plan_differences(before, plan("b")) == []
    Image.new("L", (4, 4), 99).save(tmp_path / "b" / "test" / "a" / "0.png")
    assert plan_differences(before, plan("b")) == ["validation_content"]
    Image.new("L", (4, 4), 99).save(tmp_path / "b" / "train" / "b" / "1.png")
    assert plan_differences(before, plan("b")) == ["content", "validation_content"]


def test_a_plan_that_recorded_no_content_holds_to_the_place() -> None:
    recorded = {"source": "a", "validation_source": "v", "content": "x"}
    assert plan_differences(recorded, {**recorded, "source": "b", "validation_content": "y"}) == []
    now = {**recorded, "validation_source": "w", "validation_content": "y"}
    assert plan_differences(recorded, now) == ["validation_source"]
    assert plan_differences({"source": "a"}, {"source": "b"}) == ["source"]
