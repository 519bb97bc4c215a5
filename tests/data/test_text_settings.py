"""The data section from YAML and the command line to what is read; mistakes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genscale.data.text.settings import TextDataSettings, readings
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.settings.parser import parse_config
from genscale.supervise.run_folder import config_yaml

YAML = """
data:
  sources:
    - {source: books.parquet, weight: 0.7}
    - source: [web/a.jsonl.zst, https://host/web/b.jsonl.zst]
      weight: 3
      name: web
      column: body
      filters: {language: en, score: ">=3"}
    - {source: chats.jsonl, weight: 0.3, messages_column: messages}
  filters: {kind: [a, b]}
  min_characters: 100
"""


def test_entries_of_a_mixture_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    config = parse_config(FAMILIES, ["--config", str(tmp_path / "run.yaml"), "--data.column", "content"])
    books, web, chats = readings(config.data)
    assert [(r.label, r.weight) for r in (books, web, chats)] == [("books", 0.7), ("web", 3), ("chats", 0.3)]
    assert books.spec.column == "content" and web.spec.column == "body" and not web.spec.pairs and chats.spec.pairs
    assert web.spec.locations == ("web/a.jsonl.zst", "https://host/web/b.jsonl.zst") and not books.spec.locations
    assert [rule.column for rule in books.spec.filters] == ["kind"]
    assert [(rule.column, rule.comparison, rule.value) for rule in web.spec.filters] == [
        ("language", "equal", "en"), ("score", "greater_equal", 3)]
    assert {r.spec.shortest for r in (books, web, chats)} == {100}
    # The run's own config.yaml means the same.
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert parse_config(FAMILIES, ["--config", str(tmp_path / "again.yaml")]).data == config.data


def test_sources_on_the_command_line() -> None:
    arguments = ["--data.sources", '[{"source": "a.txt"}, {"source": "b.txt", "weight": 2}]']
    found = readings(parse_config(FAMILIES, arguments).data)
    assert [(r.label, r.weight, r.spec.name) for r in found] == [("a", 1, "a.txt"), ("b", 2, "b.txt")]
    several = readings(parse_config(FAMILIES, ["--data.source", '["a.txt", "b.txt"]']).data)[0]
    assert several.spec.locations == ("a.txt", "b.txt") and several.spec.name == "a.txt and 1 more"
    assert readings(parse_config(FAMILIES, ["--data.source", "[1].txt"]).data)[0].spec.name == "[1].txt"


def test_pairs_of_the_section_hold_for_entries_that_name_no_column_of_their_own() -> None:
    settings = TextDataSettings(prompt_column="q", answer_column="a", sources=[
        {"source": "x"}, {"source": "y", "column": "text"}, {"source": "z", "messages_column": "m"}])
    x, y, z = (reading.spec for reading in readings(settings))
    assert (x.prompt, x.answer) == ("q", "a") and not y.pairs and (z.messages, z.prompt) == ("m", None)


@pytest.mark.parametrize(("changes", "words"), [
    ({"sources": "a.txt"}, ["data.sources='a.txt': must be a list of entries"]),
    ({"sources": ["a.txt"]}, ["data.sources[0]='a.txt': ", "mapping with a source"]),
    ({"sources": [{"weight": 1}]}, ["data.sources[0]={'weight': 1}: ", "mapping with a source"]),
    ({"sources": [{"source": "a"}, {"source": "b", "wieght": 2}]}, ["data.sources[1].wieght: unknown key", "'weight'"]),
    ({"sources": [{"source": "a", "weight": "much"}]}, ["data.sources[0].weight='much': must be a number"]),
    ({"sources": [{"source": 3}]}, ["data.sources[0].source=3: must be text"]),
    ({"sources": [{"source": []}]}, ["data.sources[0].source=[]: is an empty list"]),
    ({"sources": [{"source": "a", "document": "page"}]}, ["data.sources[0].document='page': must be paragraph, line or file"]),
    ({"sources": [{"source": "a", "prompt_column": "q"}]}, ["data.sources[0].prompt_column=q: ", "answer_column"]),
    ({"sources": [{"source": "a", "filters": {"x": None}}]}, ["data.sources[0].filters.x=None: is no condition"]),
    ({"source": []}, ["data.source=[]: is an empty list"]),
    ({"filters": "en"}, ["data.filters='en': must be conditions by column"]),
])
def test_mistakes_are_one_clear_line(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        readings(TextDataSettings(**changes))
    assert str(caught.value).startswith(words[0]) and all(word in str(caught.value) for word in words), str(caught.value)


def test_a_source_of_another_type_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {source: 3}")
    with pytest.raises(UserError, match="data.source: must be text or a list of texts, not 3"):
        parse_config(FAMILIES, ["--config", str(tmp_path / "run.yaml")])
