"""Rows of conversations: which are learnt from, which are left out, and what is said of it."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from genscale.data import left_out
from genscale.data.conversations import conversations, pair_text, read_document
from genscale.data.spec import Spec
from genscale.data.text import sources
from genscale.data.text.chat_template import ChatTemplate
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.pairs import PairEncoder
from genscale.data.text.tokenizers import load_tokenizer, train_bpe
from genscale.errors import UserError

CHATML = ("{% if tools %}{{ 'tools ' + (tools | tojson) + '\n' }}{% endif %}{% for m in messages %}{% if m.role == 'system' %}"
          "{{ raise_exception('No system here') }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
          "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a ChatML tokenizer whose template has no system role."""
    folder = tmp_path_factory.mktemp("chat")
    backend = Backend.from_file(str(train_bpe(["the assistant says what the user says 1 + 1 = 2"] * 3, 300, folder)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": CHATML}))
    return str(folder)


def row(number: int, role: str = "assistant", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"what is {number} + 1?"}, {"role": role, "content": f"{number + 1}"}]
    return {"messages": messages, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def open_data(source: str, tokenizer: str, **changes: Any) -> TextData:
    return TextData(TextDataSettings(**{"source": source, "messages_column": "messages", "tokenizer": tokenizer, "lanes": 2,
                                        "sequence_length": 40, **changes}), seed=3)


def refused_at(*numbers: int, count: int = 300) -> list[dict[str, Any]]:
    rows = [row(number) for number in range(count)]
    for number in numbers:
        rows[number]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    return rows


def epoch(data: TextData, lane: int = 0) -> set[str]:
    """The questions of a lane's first epoch."""
    tokens: list[int] = []
    for sample, cursor in data.open_lane(lane):
        tokens += sample["tokens"][1:].tolist()
        if cursor["place"]["epoch"]:
            break
    return {part.split("?")[0] for part in data.tokenizer.decode(tokens).split("what is ")[1:]}


def test_a_conversation_that_the_template_refuses_is_left_out_and_named(
        tmp_path: Path, chat_model: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = open_data(write(tmp_path / "whole.jsonl", refused_at()), chat_model)
    without = write(tmp_path / "chats.jsonl", [one for number, one in enumerate(refused_at()) if number not in (7, 200)])
    expected = open_data(without, chat_model).plan()
    assert not caplog.records
    data = open_data(write(tmp_path / "chats.jsonl", refused_at(7, 200)), chat_model)
    line, = (record.message for record in caplog.records)
    assert "2 of 300 conversations are left out" in line and "row 7 of chats.jsonl" in line and "row 200 of chats.jsonl" in line
    assert "No system here" in line and "\ue0f0" not in line and "\n" not in line
    # A run goes on when the rows have been removed: it has not seen them.
    assert data.plan() == expected and whole.plan() != expected
    assert not {"7 + 1", "200 + 1"} & (epoch(data) | epoch(data, 1)) and {"8 + 1", "7 + 1"} <= epoch(whole) | epoch(whole, 1)


def test_a_run_is_not_ended_by_a_row_and_goes_on_without_it(
        genscale: Any, tiny_config: Path, tiny_run: Path, tmp_path: Path, chat_model: str) -> None:
    source = write(tmp_path / "chats.jsonl", refused_at(7))
    run = ("train", "--config", tiny_config, "--data.source", source, "--data.messages_column", "messages", "--data.tokenizer",
           chat_model, "--data.lanes", 4, "--train.steps")
    done = genscale(*run, 2)
    assert done.code == 0 and done.err.count("1 of 300 conversations are left out") == 1, done.err
    write(tmp_path / "chats.jsonl", [one for number, one in enumerate(refused_at(7)) if number != 7])
    done = genscale(*run, 4, "--data.bad_share", 0)
    assert done.code == 0 and (tiny_run / "checkpoints" / "step-00000004").is_dir(), done.err


def test_in_a_stream_the_others_keep_their_order_at_every_resume(
        tmp_path: Path, chat_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    valid = write(tmp_path / "valid.jsonl", [row(1)])
    many = {"validation_source": valid, "shuffle_window": 16, "bad_share": 0.1}
    data = open_data(write(tmp_path / "chats.jsonl", refused_at(7, 200)), chat_model, **many)
    undisturbed = list(islice(data.open_lane(1), 150))
    assert undisturbed[-1][1]["place"]["epoch"] >= 1
    cursor = None
    for i, (sample, after) in enumerate(undisturbed):
        if i % 7 == 0:
            lane = pickle.loads(pickle.dumps(data)).open_lane(1, json.loads(json.dumps(cursor)))
        again, cursor = next(lane)
        assert all(np.array_equal(again[key], sample[key]) for key in ("tokens", "mask")) and cursor == after
    seen = [set().union(*(epoch(data, lane) for lane in range(2))) for _ in range(2)]
    assert seen[0] == seen[1] and {"8 + 1", "199 + 1"} <= seen[0] and not {"7 + 1", "200 + 1"} & seen[0]
    named = [record.message for record in caplog.records if "chats.jsonl" in record.message]
    assert any("row 7 of chats.jsonl" in line and "it is left out, as 1 so far" in line for line in named)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_too_many_of_them_end_the_run(tmp_path: Path, chat_model: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(left_out, "FIRST_JUDGED", 100)
    source = write(tmp_path / "chats.jsonl", refused_at(*range(3, 300, 7)))
    settings = {"validation_source": write(tmp_path / "valid.jsonl", [row(1)])}
    with pytest.raises(UserError, match=r"row 3 of chats\.jsonl.*No system here.* of \d+ conversations cannot be learnt from, "
                                        r"more than data\.bad_share=0\.01: mend or remove them, or set data\.bad_share above"):
        list(islice(open_data(source, chat_model, **settings).open_lane(0), 200))
    assert len(epoch(open_data(source, chat_model, bad_share=0.5, **settings))) > 100


def test_a_lane_of_refused_conversations_alone_ends(tmp_path: Path, chat_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr("genscale.data.text.pairs.LONGEST_RUN", 300)
    settings = {"bad_share": 1.0, "validation_source": write(tmp_path / "valid.jsonl", [row(1)])}
    with pytest.raises(UserError, match="No system here"):
        open_data(write(tmp_path / "chats.jsonl", refused_at(*range(40), count=40)), chat_model, **settings)
    data = open_data(write(tmp_path / "chats.jsonl", refused_at(*range(1, 40), count=40)), chat_model, **settings)
    with pytest.raises(UserError, match="No system here"):
        for lane in range(2):  # one of them has the good row
            next(data.open_lane(lane))


def test_other_roles_answer_where_a_setting_says_so(tmp_path: Path, chat_model: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(number, "assistant" if number % 10 == 0 else "model") for number in range(100)]
    source = write(tmp_path / "chats.jsonl", rows)
    assert len(open_data(source, chat_model)._validation) >= 1
    line, = (record.message for record in caplog.records)
    assert "nobody answers in 90 of 100 conversations, which are left out: their roles are" in line and "model" in line
    assert "data.answer_roles=['assistant']" in line
    caplog.clear()
    both = open_data(source, chat_model, answer_roles=["assistant", "model"])
    same = open_data(write(tmp_path / "same.jsonl", [row(number) for number in range(100)]), chat_model)
    assert not caplog.records
    for (one, _), (other, _) in islice(zip(both.open_lane(0), same.open_lane(0), strict=True), 30):
        assert all(np.array_equal(one[key], other[key]) for key in ("tokens", "mask"))
    assert both.plan()["answer_roles"] == ["assistant", "model"] and "answer_roles" not in same.plan()


@pytest.mark.parametrize(("messages", "words"), [
    ([{"role": "user", "content": "hi"}, {"role": "gpt", "content": "hello"}],
     ["no conversation with an answer", "their roles are user, gpt", "data.answer_roles=['assistant']"]),
    ([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
     ["row 0 of chats.jsonl", "from and value, as ShareGPT", "human as user, gpt as assistant"]),
    ([{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": [{"type": "text"}]}],
     ["row 0 of chats.jsonl", "a part of type 'image'", "only text"]),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "name": "x"}], ["row 0", "empty answer"]),
])
def test_rows_of_another_shape_are_one_line(tmp_path: Path, chat_model: str, messages: list, words: list[str]) -> None:
    source = write(tmp_path / "chats.jsonl", [{"messages": messages}] * 40)
    with pytest.raises(UserError) as caught:
        open_data(source, chat_model)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(caught.value)
    assert "set data.bad_share above" not in str(caught.value)  # which has no value above 1


def test_no_role_is_no_setting(tmp_path: Path, chat_model: str) -> None:
    with pytest.raises(UserError, match=r"data.answer_roles=\[\]: names nobody"):
        open_data(write(tmp_path / "chats.jsonl", [row(1)] * 40), chat_model, answer_roles=[])


PARTS = "{% for m in messages %}{{ m.role + ': ' }}{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
BOTH = ("{% for m in messages %}{{ m.role + ': ' }}{% if m.content is string %}{{ m.content }}{% else %}{% for part in "
        "m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}")
TEXTS = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"


@pytest.mark.parametrize("template", [PARTS, BOTH, TEXTS, TEXTS.replace("+", "~")])
def test_text_and_parts_are_read_by_every_template(template: str) -> None:
    spec = Spec("data.source", "here", messages="m")
    found = [[{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "assistant", "content": "hello\n"}],
             [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "hello\n"}]}]]
    documents = conversations({"m": found}, spec, None, "row {}".format)
    assert [pair_text(document) for document in documents] == ["hi\nhello\n"] * 2
    chat = ChatTemplate(template, {}, ["</s>"], "here")
    for document in documents:
        text, spans = chat.answers(*read_document(document))
        assert text == "user: hi</s>assistant: hello\n</s>" and [text[slice(*span)] for span in spans] == ["hello\n</s>"]


def test_tools_are_rendered_and_calls_are_as_written(tmp_path: Path, chat_model: str) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ({"a": 1}, {"b": "2"})]
    rows = [{"messages": [{"role": "user", "content": "go"},
                          {"role": "assistant", "content": None, "tool_calls": [calls[i % 2]]},
                          {"role": "tool", "content": "ok"}, {"role": "assistant", "content": "done"}],
             "tools": [{"type": "function", "function": {"name": f"f{i % 2}"}}] if i % 3 else None} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    as_text = [{**one, "tools": json.dumps(one["tools"])} for one in rows]
    stream = open_data(write(tmp_path / "chats.jsonl", as_text), chat_model).streams[0]
    encoder = stream._pairs
    for source in (stream.source, open_data(str(tmp_path / "chats.parquet"), chat_model).streams[0].source):
        documents = [*source.documents(), *source.held_out()]
        texts = {encoder._written(document)[0] for document in documents}
        shown = [f"<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n<call>{{\"name\": \"f\", \"arguments\": {arguments}}}"
                 "<|im_end|>\n<|im_start|>tool\nok<|im_end|>\n<|im_start|>assistant\ndone<|im_end|>\n"
                 for arguments in ('{"a": 1}', '{"b": "2"}')]
        offered = ["", 'tools [{"type": "function", "function": {"name": "f0"}}]\n',
                   'tools [{"type": "function", "function": {"name": "f1"}}]\n']
        assert texts == {offered[0] + shown[0], offered[0] + shown[1], offered[1] + shown[0], offered[2] + shown[1]}
        for text, spans in map(encoder._written, documents):
            assert [text[slice(*span)] for span in spans] == [text[text.index("<call>"):text.index("\n<|im_start|>tool")],
                                                              "done<|im_end|>"]
    without = open_data(str(tmp_path / "chats.parquet"), chat_model, tools_column=None)
    assert not any("f0" in document for document in without.streams[0].source.documents())
    with pytest.raises(UserError, match=r"data.tools_column=functions: .*columns messages, tools.*to the one of the tools"):
        open_data(str(tmp_path / "chats.parquet"), chat_model, tools_column="functions")


def test_nulls_that_a_row_writes_stay_in_its_calls() -> None:
    """What comes from JSON is not filled up; a message's own null is none, as transformers has it."""
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    messages = [{"role": "user", "content": "go", "name": None}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    document, = conversations({"m": [messages]}, Spec("data.source", "here", messages="m"), None, "row {}".format)
    assert json.loads(document) == [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}]
    assert document.where == "data.source=here: row 0"


def test_an_end_of_text_in_a_users_words_does_not_blame_the_template(tmp_path: Path, chat_model: str,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    rows = refused_at()
    rows[5]["messages"][0]["content"] = "what does <|endoftext|> mean?"
    source = write(tmp_path / "chats.jsonl", rows)
    open_data(source, chat_model, separate_documents=True)
    line, = (record.message for record in caplog.records)
    assert "row 5 of chats.jsonl" in line and "it has the words <|endoftext|>" in line and "chat template" not in line
    caplog.clear()
    open_data(source, chat_model)
    assert not caplog.records


def test_the_end_of_text_is_learnt_where_the_assistant_has_the_last_word(chat_model: str) -> None:
    encoder = PairEncoder(load_tokenizer(chat_model), Spec("data.source", "here", messages="m"), separate=False)
    for role, learnt in (("assistant", 1), ("user", 0)):
        messages = [*row(1)["messages"], {"role": role, "content": "so"}]
        coded = encoder.encode([json.dumps(messages)])[0]
        assert coded[-1] >> 1 == encoder._tokenizer.end_of_text and coded[-1] & 1 == learnt


def test_a_template_for_tools_is_used_for_them(tmp_path: Path, chat_model: str) -> None:
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((Path(chat_model) / name).read_text())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    plain = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    config |= {"tokenizer_class": "PreTrainedTokenizerFast",
               "chat_template": [{"name": "default", "template": plain}, {"name": "tool_use", "template": "with " + plain}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    encoder = PairEncoder(tokenizer, Spec("data.source", "here", messages="m"), separate=False)
    theirs, messages, tools = AutoTokenizer.from_pretrained(str(tmp_path)), row(1)["messages"], [{"name": "f"}]
    for given, document in ((None, messages), (tools, {"messages": messages, "tools": tools})):
        assert encoder._written(json.dumps(document))[0] == theirs.apply_chat_template(messages, tools=given, tokenize=False)
    assert load_tokenizer(str(tokenizer.save(tmp_path / "kept"))).companions == tokenizer.companions


def test_what_is_left_out_is_said_ever_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    counted = left_out.LeftOut("data.source=here", 1.0, "data.answer_roles=['assistant']")
    for number in range(1200):
        counted.read += 1
        counted.refuse(UserError(f"row {number} is bad"))
        counted.pass_over(["user"])
    assert len(caplog.records) == 3 + 3 + 4  # the first three, 10, 100, 1000; and 1, 10, 100, 1000
