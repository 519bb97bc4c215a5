"""genscale data inspect for a run on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image


def test_inspect_counts_images_classes_and_damage(genscale: Callable, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, count in (("cats", 30), ("dogs", 10)):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(tmp_path / "train" / name / f"{i}.png")
        Image.new("RGB", (5, 7)).save(tmp_path / "val" / name / "0.png")
    (tmp_path / "train" / "cats" / "0.png").write_bytes(b"no image")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"family": "dcgan"}, "data": {"source": str(tmp_path), "labels": True}}))
    done = genscale("data", "inspect", "--config", config, "--data.size", 16)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == f"{tmp_path}: 40 images to train on, 2 to validate on"
    assert "16x16 pixels, crop center, colour" in lines[1] and "40 read with" in lines[2] and "1 of them damaged" in lines[2]
    assert [line.split(" ")[:2] for line in lines[4:6]] == [["cats", "30"], ["dogs", "10"]]


def test_inspect_of_a_texts_config_shows_blocks(genscale: Callable, tiny_config: Path) -> None:
    done = genscale("data", "inspect", "--config", tiny_config, "--blocks", 1)
    assert done.code == 0, done.err
    assert "block 0 (lane 0): 32 tokens" in done.out and "block 1" not in done.out


def test_mistakes_in_the_data_section_are_one_line(genscale: Callable, tmp_path: Path) -> None:
    for key, value, words in (("channels", 2, ["data.channels", "1, 3"]),
                              ("crop", "centre", ["data.crop", "did you mean 'center'"]),
                              ("sise", 16, ["--data.sise: unknown setting", "data.size"]),
                              ("source", tmp_path / "nowhere", ["there is no such file or folder", "digits"])):
        message = genscale("data", "inspect", "--model.family", "dcgan", f"--data.{key}", value).message()
        assert all(word in message for word in words), message
