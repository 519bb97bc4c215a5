"""What judges say that may say something else when asked again is written down before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from genscale.errors import CheckpointNotWritten
from genscale.rewards.base import Answer
from genscale.rewards.collection import Rewards, build_rewards
from genscale.rewards.registry import REWARDS


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Every answer that the judge `dice` was asked about, of which it says another number each time."""
    numbers: list[int] = []

    def dice(judged):
        numbers.extend(each.sample if isinstance(each, Answer) else -1 for each in judged)
        return [len(numbers) - len(judged) + index for index in range(len(judged))]

    monkeypatch.setitem(REWARDS.given, "dice", dice)
    return numbers


def opened(folder: Path, rank: int = 0, step: int = 0, reads: str = "text") -> Rewards:
    rewards = build_rewards([{"name": "dice"}, {"name": "exact"}] if reads == "text" else [{"name": "dice"}], reads)
    rewards.open(folder, rank, step, lambda doing: None)
    return rewards


def answers(*samples: int, text: str = "a") -> list[Answer]:
    return [Answer("?", text, {"answer": "a"}, True, sample, 0) for sample in samples]


def test_a_life_on_other_processes_takes_what_was_said(asked, tmp_path, caplog):
    first = [opened(tmp_path, rank) for rank in (0, 1)]
    for step in (1, 2):
        before = [rewards.score(step, answers(4 * step + 2 * rank, 4 * step + 2 * rank + 1))[0]
                  for rank, rewards in enumerate(first)]
    count = len(asked)
    alone = opened(tmp_path, step=1)
    parts, _ = alone.score(2, answers(8, 9, 10, 11, 12))
    assert torch.equal(parts[:4], torch.cat(before)) and asked[count:] == [12]
    assert parts[:, 1].tolist() == [1] * 5
    assert alone.score(2, answers(12))[0].tolist() == [[count, 1]], "also in the same life"
    record = json.loads((tmp_path / "rewards-00000.jsonl").read_text().splitlines()[0])
    assert {key: record[key] for key in ("step", "sample", "member", "name")} == {"step": 1, "sample": 4, "member": 0,
                                                                                "name": "dice"}
    assert len(record["hash"]) == 32 and "exact" not in (tmp_path / "rewards-00000.jsonl").read_text()
    assert not caplog.records


def test_another_answer_at_the_same_address_is_judged_anew_and_said_once(asked, tmp_path, caplog):
    opened(tmp_path).score(1, answers(0, 1, 2))
    resumed = opened(tmp_path)
    assert resumed.score(1, answers(0, 1, text="b"))[0][:, 0].tolist() == [3, 4]
    assert resumed.score(1, answers(2))[0][:, 0].tolist() == [2]
    (line,) = caplog.messages
    assert "step 1, sample 0, answer 0 is another one" in line
    assert opened(tmp_path).score(1, answers(0, 1, text="b"))[0][:, 0].tolist() == [3, 4], "both are known from now on"


def test_a_line_that_was_torn_is_passed_over_and_no_other_is_lost(asked, tmp_path):
    opened(tmp_path).score(1, answers(0, 1))
    file = tmp_path / "rewards-00000.jsonl"
    whole = file.read_bytes()
    for cut in (len(whole) - 1, len(whole) - 20, len(whole) // 2 + 1):
        file.write_bytes(whole[:cut])
        asked.clear()
        opened(tmp_path).score(1, answers(0, 1, 2))
        assert asked == ([1, 2] if cut < len(whole) - 1 else [2]), "the number of a line without its end is a whole one"
        asked.clear()
        opened(tmp_path).score(1, answers(0, 1, 2))
        assert asked == []
    file.write_bytes(b"\xff\n[]\n{}\nnull\n" + b"[" * 70_000 + b"\n" + whole)
    opened(tmp_path).score(1, answers(0, 1))
    assert asked == []


@pytest.mark.parametrize("changed", ['"reward": NaN', '"reward": 1e999', f'"reward": {"9" * 400}', '"reward": "x"',
                                     '"reward": [1]'], ids=range(5))
def test_what_a_stranger_has_written_is_no_judgement(changed, asked, tmp_path):
    opened(tmp_path).score(1, answers(0))
    file = tmp_path / "rewards-00000.jsonl"
    line = file.read_text().replace('"reward": 0', changed)
    file.write_text(line + line.replace('"step": 1', '"step": 1e999') + line.replace('"sample": 0', '"sample": []'))
    asked.clear()
    assert opened(tmp_path).score(1, answers(0))[0].isfinite().all() and asked == [0]


def test_going_back_finds_what_was_said_and_what_is_past_is_forgotten(asked, tmp_path):
    rewards = opened(tmp_path)
    said = [rewards.score(step, answers(0))[0] for step in (1, 2, 3)]
    assert len(rewards._journal._said) == 1
    assert torch.equal(torch.cat([rewards.score(step, answers(0))[0] for step in (1, 2, 3)]), torch.cat(said))
    assert asked == [0, 0, 0]
    assert len(opened(tmp_path, step=2)._journal._said) == 2


def test_pictures_are_known_by_their_values(asked, tmp_path):
    images, at = torch.rand(3, 1, 2, 2), ([7, 7, 8], [0, 1, 0])
    first = opened(tmp_path, reads="images").score(1, images, *at)[1]
    other = images + torch.tensor([0, 0, 1e-6]).view(3, 1, 1, 1)
    again = opened(tmp_path, reads="images").score(1, other, torch.tensor(at[0]), torch.tensor(at[1]))[1]
    assert again.tolist() == [*first[:2].tolist(), 3]


def test_nothing_is_used_that_could_not_be_written(asked, small_disk):
    disk = small_disk("64k")
    rewards = opened(disk)
    with pytest.raises(CheckpointNotWritten, match=r"rewards-00000.jsonl: cannot be written \(No space left on device\)"):
        for step in range(1000):
            rewards.score(step, answers(*range(20)))


def test_nothing_is_written_through_a_link(asked, tmp_path):
    (tmp_path / "elsewhere").write_text("")
    os.symlink(tmp_path / "elsewhere", tmp_path / "rewards-00000.jsonl")
    with pytest.raises(CheckpointNotWritten, match="is a link"):
        opened(tmp_path).score(1, answers(0))
    assert (tmp_path / "elsewhere").read_text() == ""
