"""docs/how-to/rewards.md: every config, file of a site and line of Python on it is one."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from genscale.rewards import site
from genscale.rewards.base import Answer
from genscale.rewards.collection import build_rewards
from genscale.rewards.entries import completed
from genscale.rewards.registry import BUILT_IN, REWARDS

TEXT = (Path(__file__).resolve().parents[2] / "docs/how-to/rewards.md").read_text()


def blocks(head: str) -> list[str]:
    return re.findall(rf"^```{re.escape(head)}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_config_on_the_page_is_one_and_every_reward_is_on_it():
    shown = [entry for block in blocks('yaml title="in a config"') for entry in yaml.safe_load(block)["rewards"]]
    completed(shown)
    assert {entry["name"] for entry in shown} == set(BUILT_IN) - {"likelihood"}  # whose one setting is a run
    listed = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(BUILT_IN)
    texts = [entry for entry in shown if entry["name"] not in ("program", "http", "classifier", "brightness")]
    row = {"answer": "1", "target": 24, "numbers": "4 6"}
    build_rewards(texts, "text").score(1, [Answer("?", "(4*6)", row, True, 0, 0)])


def test_the_file_of_a_site_is_one(tmp_path, monkeypatch):
    (block,) = blocks('yaml title="site.yaml"')
    (tmp_path / "judge").write_text("#!/bin/sh\n")
    (tmp_path / "judge").chmod(0o755)
    (tmp_path / "site.yaml").write_text(block.replace("/opt/judges/unit-tests", str(tmp_path / "judge")))
    monkeypatch.setenv(site.VARIABLE, str(tmp_path / "site.yaml"))
    allowed = site.read_reward_site()
    assert allowed.program("unit-tests").memory_mb == 512
    allowed.check_address("https://judge.example.org/v1/score")


def test_the_python_of_the_page_judges(tmp_path, monkeypatch):
    (tmp_path / "our_rewards.py").write_text("".join(blocks("python")))
    monkeypatch.syspath_prepend(tmp_path)
    page = importlib.import_module("our_rewards")
    with REWARDS.knowing({name: getattr(page, name) for name in ("short", "Polite", "left_is_bright")}):
        rewards = build_rewards([{"name": "short"}, {"name": "Polite", "word": "thanks", "weight": 2}], "text")
        assert rewards.score(1, [Answer("hello?", "no thanks", {}, True, 0, 0)])[1].item() == pytest.approx(3)
        images = torch.cat([torch.ones(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)], 3)
        assert build_rewards([{"name": "left_is_bright"}], "images").score(1, images, [0], [0])[1].item() == 0.5
