"""The edges of prompt/answer pairs: tokens that straddle an answer's beginning, clocks, lanes and blocks without an answer."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Backend

from genscale.data.columns import documents
from genscale.data.spec import Spec
from genscale.data.text import chat_rendering
from genscale.data.text.chat_template import ChatTemplate
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.pairs import PairEncoder
from genscale.data.text.tokenizers import load_tokenizer
from genscale.errors import UserError


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pairs(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i} + 1?", "reply": f"{i + 1} " * (1 + i % 9)} for i in range(count)]


def settings(path: Path, **changes: Any) -> TextDataSettings:
    return TextDataSettings(**{"source": str(path), "prompt_column": "question", "answer_column": "reply", "lanes": 3,
                               "sequence_length": 24, **changes})


SPACED = ("{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content }}{% else %}"
          "{{ message.content + '\n' }}{% endif %}{% endfor %}")


@pytest.mark.parametrize("pre_tokenizer", ["metaspace", "bytes"])
def test_a_token_that_reaches_into_an_answer_is_learnt(tmp_path: Path, pre_tokenizer: str) -> None:
    """As `char_to_token` of the answer's first character has it: the space before it is the template's."""
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = (pre_tokenizers.Metaspace() if pre_tokenizer == "metaspace" else
                             pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False))
    texts = ["is it?\n yes, naturally", "is it?\n no"] * 20
    backend.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=["</s>", "<unk>"], show_progress=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": SPACED}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    encoder = PairEncoder(load_tokenizer(str(tmp_path)), Spec("data.source", "here", messages="m"), separate=False)
    for answer in ("yes, naturally", "no"):
        messages = chat([("user", "is it?"), ("assistant", answer)])
        text = theirs.apply_chat_template(messages, tokenize=False)
        start = text.index(answer)
        known = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        first, last = known.char_to_token(start), known.char_to_token(start + len(answer) - 1)
        coded = encoder.encode([json.dumps(messages)])[0]
        assert (coded[:-1] >> 1).tolist() == known["input_ids"]
        assert np.flatnonzero(coded[:-1] & 1).tolist() == list(range(first, last + 1))
        assert known["offset_mapping"][first][0] < start  # it straddles


@pytest.mark.parametrize("template", [
    "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M') + '\n' }}",
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}{{ '1 Jan 2000' }}{% endif %}",
])
def test_a_template_knows_no_clock(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    turns = template + "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    texts = set()
    for day in (5, 6):
        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None, day: int = day) -> datetime:
                return datetime(2031, 3, day, tzinfo=tz)
        monkeypatch.setattr(chat_rendering, "datetime", Clock)
        texts.add(ChatTemplate(turns, {}, [], "here").render(chat([("user", "hi"), ("assistant", "hello")])))
    text, = texts
    # A template that asks has a date of its own.
    assert text.startswith("1 Jan 2000" if "is defined" in template else "Today: 26 Jul 2024 00:00")


def test_fewer_pairs_than_lanes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs(24))  # two are held out
    with pytest.raises(UserError, match="data.lanes=48: .*only 22 pairs.*data.lanes to 22 at most"):
        TextData(settings(path, lanes=48), seed=1)


def test_a_lane_that_never_gets_a_pair_is_refused(tmp_path: Path) -> None:
    """One pair covers the middle third of the lanes in any order of three."""
    rows = [{"question": f"{i}?", "reply": "long " * (20_000 * (i == 1)) + "yes"} for i in range(3)]
    path, valid = write(tmp_path / "pairs.jsonl", rows), write(tmp_path / "valid.jsonl", pairs(1))
    data = TextData(settings(path, validation_source=str(valid)), seed=1)
    caught: list[UserError] = []

    def read() -> None:
        try:
            next(data.open_lane(1))
        except UserError as error:
            caught.append(error)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert caught and "data.lanes=3: lane 1" in str(caught[0]) and "1000 epochs" in str(caught[0])


def test_a_message_may_carry_its_time() -> None:
    messages = [{"role": "assistant", "content": "yes", "at": datetime(2024, 1, 2)}]
    table = pa.table({"m": [messages]})
    document, = documents(table, Spec("data.source", "here", messages="m"), "rows", 0, 0, 1)
    assert json.loads(document) == [{"role": "assistant", "content": "yes", "at": "2024-01-02 00:00:00"}]


def test_a_validation_set_without_an_answer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs(60))
    (tmp_path / "valid.jsonl").write_text(json.dumps({"question": "why? " * 50, "reply": "so"}))
    source = str(tmp_path / "valid.jsonl")
    with pytest.raises(UserError, match="data.validation_blocks=2: .*no token of an answer; set more, or a larger data.seq"):
        TextData(settings(path, validation_source=source, validation_blocks=2), seed=1)
    assert len(TextData(settings(path, validation_source=source, validation_blocks=20), seed=1).validation()) > 2
