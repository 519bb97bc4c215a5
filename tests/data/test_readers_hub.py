"""A hub dataset end to end, through a small server that speaks as much of the hub's API as `datasets` uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from genscale.data.readers import find_shards
from genscale.data.spec import Spec
from genscale.data.text.sources import text_hash
from genscale.errors import UserError

NAME = "someone/corpus"
TEXTS = [f"document {i} of the hub" for i in range(300)]
FILES = {"train-0.jsonl": TEXTS[:150], "train-1.jsonl": TEXTS[150:], "validation.jsonl": ["a validation text", "and another"]}
CONTENT = {name: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode() for name, texts in FILES.items()}

SCRIPT = """
import json, sys
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.settings import readings
from genscale.data.text.stream import open_training_source
from genscale.errors import UserError

def read(changes):
    settings = TextDataSettings(**changes)
    source = open_training_source(readings(settings)[0].spec, settings, seed=1)
    lanes = []
    for lane in range(settings.lanes):
        for piece in source.read(lane):
            if piece.place["epoch"]:
                break
            lanes.append(piece.text)
    validation = [sample["tokens"].tolist() for sample in TextData(settings, seed=1).validation()]
    return {"documents": list(source.documents()), "lanes": lanes, "plan": source.plan(), "held": list(source.held_out()),
            "validation": validation}


for changes in json.loads(sys.argv[1]):
    try:
        print(json.dumps(read(changes)))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""


CASES: dict[str, dict[str, Any]] = {
    "held out": {"validation_fraction": 0.1}, "validation split": {"validation_source": NAME}, "split": {"split": "test"},
    "subset": {"subset": "german"}, "name": {"source": "someone/nothing"}, "column": {"column": "content"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, serve_hub: Callable[..., str],
          python_process: Callable[..., str]) -> dict[str, dict[str, Any]]:
    """What one process reads with the settings of each case: the hub's address is fixed when its client is imported."""
    home = tmp_path_factory.mktemp("home")
    settings = [{"source": NAME, "lanes": 4, "sequence_length": 16, "shuffle_window": 8, **case} for case in CASES.values()]
    said = python_process(SCRIPT, json.dumps(settings), HF_ENDPOINT=serve_hub(NAME, CONTENT), HF_HOME=str(home),
                          HF_HUB_OFFLINE="0", timeout=240, cwd=home)
    return dict(zip(CASES, map(json.loads, said.splitlines()), strict=True))


def test_a_hub_dataset_is_streamed_by_split(found: dict[str, dict[str, Any]]) -> None:
    read = found["held out"]
    held = [text for text in TEXTS if text_hash(text) < int(0.1 * 2**64)]
    assert read["held"] == held and 10 < len(held) < 60
    assert read["documents"] == [text for text in TEXTS if text not in held]
    assert sorted(read["lanes"]) == sorted(read["documents"]) != read["lanes"]
    assert read["plan"]["order"] == "stream" and read["plan"]["shards"] == 2  # its files, dealt to the lanes
    assert read["validation"][0] == [token for text in held for token in [*text.encode(), 256]][:17]


def test_the_validation_split_of_a_hub_dataset(found: dict[str, dict[str, Any]]) -> None:
    read = found["validation split"]
    assert read["held"] == [] and read["documents"] == TEXTS
    assert read["validation"][0] == [*b"a validation text"]


@pytest.mark.parametrize(("case", "words"), [
    ("split", ["data.split=test: ", "train", "validation"]), ("subset", ["data.subset=german: "]),
    ("name", ["data.source=someone/nothing: ", "no such dataset on the Hugging Face hub", "HF_TOKEN"]),
    ("column", ["data.column=content: ", "has the columns text"]),
])
def test_mistakes_about_a_hub_dataset_are_one_line(found: dict[str, dict[str, Any]], case: str, words: list[str]) -> None:
    assert all(word in found[case]["error"] for word in words), found[case]["error"]


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"data.source={NAME}: .*hub cannot be reached.*give the path of a local file"):
        find_shards(Spec("data.source", NAME), at_least=1)
