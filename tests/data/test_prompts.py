"""Prompts as samples: what is left out and why, what travels with them, their order and where it goes on."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.made_sums import FORGOTTEN, sums
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.prompt_data import PromptData
from genscale.data.text.prompt_encoder import told_of
from genscale.data.text.prompt_settings import PromptDataSettings
from genscale.errors import UserError

ROWS = [{"question": f"{n} + 1?", "answer": n + 1, "kind": "even" if n % 2 == 0 else "odd"} for n in range(60)]


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """`data(rows, **settings)`: of a file of these rows."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> PromptData:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = {"source": str(tmp_path / "rows.jsonl"), "prompt_column": "question", "columns": ["answer", "kind"],
                 "prompt_tokens": 8, "row_bytes": 80, "lanes": 3, **settings}
        return PromptData(PromptDataSettings(**asked), seed=1)

    return make


def read(sample: dict[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    prompt, row = told_of(sample["row"].tobytes())
    ids = sample["prompt"]
    assert bytes(ids[ids >= 0].astype(np.uint8)).decode() == prompt and (ids[: len(ids) - len(prompt)] == -1).all()
    return prompt, row


def test_each_prompt_comes_once_an_epoch_with_its_columns(data: Any) -> None:
    made = data(ROWS, validation_fraction=0.1)
    held = [read(sample) for sample in made.validation()]
    lanes = [made.open_lane(lane) for lane in range(3)]
    seen: list[Any] = []
    for lane in lanes:
        for sample, cursor in lane:
            if cursor["place"]["epoch"] > 0:
                break
            seen.append(read(sample))
    assert held and sorted(prompt for prompt, _ in held + seen) == sorted(row["question"] for row in ROWS)
    assert dict(held + seen)["4 + 1?"] == {"answer": 5, "kind": "even"}


def test_a_lane_goes_on_right_after_any_prompt(data: Any) -> None:
    made = data(ROWS)
    whole = list(islice(made.open_lane(1), 90))  # over the ends of batches and of epochs
    for at in range(0, 60, 7):
        for (sample, cursor), (again, after) in zip(whole[at + 1 :], islice(made.open_lane(1, whole[at][1]), 25), strict=False):
            assert cursor == after and all((sample[name] == again[name]).all() for name in sample)


def test_filters_and_mixtures(data: Any, tmp_path: Path) -> None:
    even = data(ROWS, filters={"kind": "even"})
    assert {read(sample)[1]["kind"] for sample, _ in islice(even.open_lane(0), 30)} == {"even"}
    (tmp_path / "others.jsonl").write_text("".join(json.dumps({"asked": f"{n}!", "answer": n}) + "\n" for n in range(60)))
    entries = [{"source": str(tmp_path / "rows.jsonl"), "weight": 3},
               {"source": str(tmp_path / "others.jsonl"), "prompt_column": "asked"}]
    mixed = PromptData(PromptDataSettings(sources=entries, prompt_column="question", columns=["answer"], lanes=3), seed=1)
    asked = [read(sample)[0] for sample, _ in islice(mixed.open_lane(0), 400)]
    assert np.mean([prompt.endswith("?") for prompt in asked]) == pytest.approx(0.75, abs=0.07)
    assert mixed.plan()["data.sources[1].weight"] == 1


@pytest.mark.parametrize(("row", "why"), [
    ({"question": " "}, "data.prompt_column=question: row 60 of rows.jsonl has an empty prompt"),
    ({"question": None}, "row 60 of rows.jsonl has an empty prompt"),
    ({"question": "more than 8"}, "row 60 of rows.jsonl: its prompt is 11 tokens long, more than data.prompt_tokens=8"),
    ({"question": "?", "answer": "a" * 80}, "bytes of JSON with its columns, more than data.row_bytes=80"),
])
def test_what_cannot_be_asked_is_left_out_and_named(data: Any, caplog: Any, row: dict[str, Any], why: str) -> None:
    with caplog.at_level(logging.WARNING, logger="genscale"):
        made = data([*ROWS, row], bad_share=0.02)
    assert "1 of 61 prompts are left out" in caplog.text and why in caplog.text
    assert all(read(sample)[0] != row["question"] for sample, _ in islice(made.open_lane(0), 60))
    with pytest.raises(UserError, match="1 of 61 prompts cannot be asked, more than data.bad_share=0.01") as error:
        data([*ROWS, row])
    assert why in str(error.value)


def test_a_column_that_is_not_there_is_named(data: Any) -> None:
    with pytest.raises(UserError, match="data.columns=anwser: .* has the columns .*did you mean 'answer'.* that rewards read"):
        data(ROWS, columns=["anwser"])
    with pytest.raises(UserError, match="has only .. prompts, less than one global batch; set train.global_batch_size to"):
        data(ROWS).check(64)


def test_the_made_sums_forget_the_carry_and_hold_some_back() -> None:
    text, held = sums(False).columns, sums(True).columns
    assert len(text["prompt"]) == 54_000 and len(held["prompt"]) == 1_000 and not set(text["prompt"]) & set(held["prompt"])
    for prompt, answer in zip(held["prompt"], held["answer"], strict=True):
        a, b = map(int, prompt.strip("=").split("+"))
        assert int(answer[::-1]) == a + b
    carries = [said == answer for prompt, answer, said in zip(text["prompt"], text["answer"], text["written"], strict=True)
               if int(prompt[1]) + int(prompt[4]) > 9 or int(prompt[0]) + int(prompt[3]) > 9]
    assert np.mean(carries) == pytest.approx(1 - FORGOTTEN, abs=0.01)
    pairs = TextData(TextDataSettings(source="sums", prompt_column="prompt", answer_column="written", sequence_length=32), 1)
    prompts = PromptData(PromptDataSettings(columns=["answer"]), 1)
    assert len(prompts.validation()) == 128 and pairs.validation()
    assert {read(sample)[0] for sample in prompts.validation()} < set(held["prompt"])
