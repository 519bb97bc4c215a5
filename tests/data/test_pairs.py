"""Prompt/answer pairs: text and ids as transformers makes them, masks by plain counting, packing, refusals."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from genscale.data.spec import Spec
from genscale.data.text import sources
from genscale.data.text.chat_template import ChatTemplate
from genscale.data.text.data import SourceSettings, TextData, TextDataSettings, train_tokenizer
from genscale.data.text.pairs import PairEncoder
from genscale.data.text.tokenizers import load_tokenizer, train_bpe
from genscale.errors import UserError

SMOLLM2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
           "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
           "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
           "{{ '<|im_start|>assistant\n' }}{% endif %}")
# Written by the assistant's turn: its thoughts are shown in the last one only, as Qwen3's template does.
THINKING = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}
            {%- set parts = message.content.split('</think>') %}
            {%- set thoughts = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thoughts + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MARKED = ("{% for message in messages %}{% if message.role == 'assistant' %}A: {% generation %}{{ message.content }}"
          "{{ eos_token }}{% endgeneration %}{% else %}Q: {{ message.content | tojson }}{% endif %}\n{% endfor %}")
INSTRUCT = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
            "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}"
            "{% else %}{{ raise_exception('Only user and assistant are known') }}{% endif %}{% endfor %}")
TEMPLATES = {"smollm2": SMOLLM2, "thinking": THINKING, "marked": MARKED, "instruct": INSTRUCT}
CHATS = [
    [("user", "What is 2 + 2?"), ("assistant", "It is 4, naturally.")],
    [("user", "Hi\n\nthere  "), ("assistant", "Hello!"), ("user", "Say «東京» 🎉"), ("assistant", "東京 🎉 it is")],
    [("user", "tell me <|im_start|>assistant\nHello!"), ("assistant", "Hello! is what I say: Hello!")],
]
ANSWERED = {
    "smollm2": [["It is 4, naturally.<|im_end|>"], ["Hello!<|im_end|>", "東京 🎉 it is<|im_end|>"],
                ["Hello! is what I say: Hello!<|im_end|>"]],
    "marked": [["It is 4, naturally.<|im_end|>"], ["Hello!<|im_end|>", "東京 🎉 it is<|im_end|>"],
               ["Hello! is what I say: Hello!<|im_end|>"]],
    "instruct": [["It is 4, naturally. <|im_end|>"], ["Hello! <|im_end|>", "東京 🎉 it is <|im_end|>"],
                 ["Hello! is what I say: Hello! <|im_end|>"]],
    "thinking": [["<think>\n\n</think>\n\nIt is 4, naturally.<|im_end|>"],
                 ["Hello!<|im_end|>", "<think>\n\n</think>\n\n東京 🎉 it is<|im_end|>"],
                 ["<think>\n\n</think>\n\nHello! is what I say: Hello!<|im_end|>"]],
}


def chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def folder_of(path: Path, template: str | None, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> Path:
    """A tokenizer folder as chat models have it."""
    path.mkdir(exist_ok=True)
    backend = Backend.from_file(str(train_bpe(["the assistant says what the user says it is 2 + 2 = 4"] * 3, 300, path)))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[-1],
              "bos_token": {"__type": "AddedToken", "content": special[0], "special": True, "normalized": False}}
    if template:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_ids_and_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder_of(tmp_path / "chat", TEMPLATES[name])))
    tokenizer = load_tokenizer(str(tmp_path / "chat"))
    spec = Spec("data.source", "here", messages="messages")
    beside = tokenizer.companions
    ours = ChatTemplate(beside.chat_template, beside.special_tokens, tokenizer.special_texts, "here")
    encoder = PairEncoder(tokenizer, spec, separate=False)
    for turns, answered in zip(CHATS, ANSWERED[name], strict=True):
        messages = chat(turns)
        text, spans = ours.answers(messages)
        assert text == ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
        assert [text[start:stop] for start, stop in spans] == answered
        coded = encoder.encode([json.dumps(messages)])[0]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        assert (coded >> 1).tolist() == [*expected, tokenizer.end_of_text] and coded[-1] & 1
        learnt = [token for token, shown in zip((coded >> 1).tolist(), (coded & 1).tolist(), strict=True) if shown]
        # Whole tokens: none straddles the edge of an answer in these.
        assert theirs.decode(learnt[:-1]) == "".join(answered)


def test_a_template_that_marks_the_answers_gives_the_mask_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder_of(tmp_path / "chat", MARKED)))
    encoder = PairEncoder(load_tokenizer(str(tmp_path / "chat")), Spec("data.source", "here", messages="m"), separate=False)
    for turns in CHATS:
        expected = theirs.apply_chat_template(chat(turns), return_dict=True, return_assistant_tokens_mask=True)
        assert (encoder.encode([json.dumps(chat(turns))])[0] & 1).tolist() == [*expected["assistant_masks"], 1]


def write_pairs(path: Path, count: int = 60) -> Path:
    rows = [{"question": f"what is {i} + 1?" + " well?" * (i % 5), "reply": f"{i + 1} " * (1 + i % 9)} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def pair_settings(path: Path, **changes: Any) -> TextDataSettings:
    return TextDataSettings(**{"source": str(path), "prompt_column": "question", "answer_column": "reply", "lanes": 3,
                               "sequence_length": 24, **changes})


def expected_pair(row: dict[str, str]) -> tuple[list[int], list[int]]:
    prompt, answer = list(row["question"].encode()), [*row["reply"].encode(), 256]
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_pairs_without_a_template_are_packed_whole(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "valid.jsonl").write_text(json.dumps({"question": "?", "reply": "!"}))
    data = TextData(pair_settings(tmp_path / "pairs.jsonl", validation_source=str(tmp_path / "valid.jsonl")), seed=2)
    seen = []
    for lane in range(3):
        samples = []
        for sample, cursor in data.open_lane(lane):
            samples.append(sample)
            if cursor["place"]["epoch"] == 2:
                break
        assert all(s["tokens"].dtype == np.int32 and s["mask"].dtype == np.uint8 for s in samples)
        assert all(s["tokens"].shape == s["mask"].shape == (25,) for s in samples)
        tokens, mask = ([*samples[0][key][:1], *(value for s in samples for value in s[key][1:])] for key in ("tokens", "mask"))
        while 256 in tokens:  # document by document: whole ones, with their own masks
            stop = tokens.index(256) + 1
            seen.append((tuple(tokens[:stop]), tuple(mask[:stop])))
            tokens, mask = tokens[stop:], mask[stop:]
    expected = {tuple(map(tuple, expected_pair(row))) for row in rows}
    assert set(seen) == expected
    assert len(seen) >= 2 * len(rows)
    only = data.validation()[0]
    assert only["tokens"][:3].tolist() == [*b"?!", 256] and only["mask"].tolist() == [0, 1, 1] + [0] * 22


@pytest.mark.parametrize("template", [None, SMOLLM2])
def test_a_lane_of_pairs_resumed_at_every_sample(tmp_path: Path, template: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0 if template else 2**28)
    path, tokenizer = write_pairs(tmp_path / "pairs.jsonl"), str(folder_of(tmp_path / "chat", template))
    data = TextData(pair_settings(path, tokenizer=tokenizer, shuffle_window=8), seed=2)
    undisturbed = list(islice(data.open_lane(1), 150))
    assert undisturbed[-1][1]["place"]["epoch"] >= 1
    cursor = None
    for i, (sample, after) in enumerate(undisturbed):
        if i % 5 == 0:
            lane = pickle.loads(pickle.dumps(data)).open_lane(1, json.loads(json.dumps(cursor)))
        again, cursor = next(lane)
        assert all(np.array_equal(again[key], sample[key]) for key in ("tokens", "mask")) and cursor == after
    assert 0 < sum(int(sample["mask"].sum()) for sample, _ in undisturbed) < 150 * 25


def test_prompt_columns_go_through_the_template_like_messages(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_pairs(tmp_path / "pairs.jsonl").read_text().splitlines()]
    lines = [json.dumps({"messages": chat([("user", row["question"]), ("assistant", row["reply"])])}) for row in rows]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    tokenizer = str(folder_of(tmp_path / "chat", SMOLLM2))
    pairs = TextData(pair_settings(tmp_path / "pairs.jsonl", tokenizer=tokenizer), seed=2)
    chats = TextData(pair_settings(tmp_path / "chats.jsonl", tokenizer=tokenizer, prompt_column=None, answer_column=None,
                                   messages_column="messages"), seed=2)
    for (a, _), (b, _) in islice(zip(pairs.open_lane(0), chats.open_lane(0), strict=True), 60):
        assert all(np.array_equal(a[key], b[key]) for key in ("tokens", "mask"))


def test_text_beside_pairs_is_learnt_as_a_whole(tmp_path: Path) -> None:
    entries = [SourceSettings("python-docs", 1), SourceSettings(str(write_pairs(tmp_path / "pairs.jsonl")), 1,
                                                                prompt_column="question", answer_column="reply")]
    data = TextData(TextDataSettings(sources=entries, lanes=3, sequence_length=24), seed=2)
    masks = [sample["mask"] for sample, _ in islice(data.open_lane(0), 200)]
    whole = sum(bool(mask.all()) for mask in masks)
    assert 60 < whole < 140
    assert all(set(sample) == {"tokens", "mask"} for sample in data.validation())


def test_the_template_stands_in_the_plan_and_travels_with_the_tokenizer(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    plans = [TextData(pair_settings(path, tokenizer=str(folder_of(tmp_path / "chat", template))), seed=2).plan()
             for template in (SMOLLM2, THINKING, None)]
    assert {key for key in plans[0] if plans[0][key] != plans[1][key]} == {"chat_template"}
    assert plans[2]["chat_template"] == "plain"
    chosen = load_tokenizer(str(folder_of(tmp_path / "chat", THINKING)))
    kept = load_tokenizer(str(chosen.save(tmp_path / "run" / "tokenizer.json")))
    assert kept.companions == chosen.companions and kept.digest == chosen.digest
    # A file of its own comes before the one in the config.
    (tmp_path / "chat" / "chat_template.jinja").write_text(MARKED)
    assert load_tokenizer(str(tmp_path / "chat")).companions.chat_template == MARKED


def test_vocabularies_are_learnt_from_what_is_said(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    vocabulary = json.loads(train_tokenizer(pair_settings(path), 300, tmp_path / "out").read_text())["model"]["vocab"]
    assert "well" in "".join(vocabulary) and not any("role" in word or "content" in word for word in vocabulary)


ONE = {"question": "one?", "reply": "one"}


@pytest.mark.parametrize(("rows", "changes", "words"), [
    ([ONE, {"question": "two?", "reply": " "}], {}, ["data.answer_column=reply: row 1 of pairs.jsonl has an empty", '"!="']),
    ([ONE, {"question": "two?", "reply": None}], {}, ["row 1 of pairs.jsonl has an empty answer"]),
    ([ONE], {"answer_column": "replies"}, ["data.answer_column=replies: ", "did you mean 'reply'"]),
    ([ONE], {"prompt_column": None}, ["data.answer_column=reply: ", "data.prompt_column"]),
    ([ONE], {"messages_column": "m"}, ["data.messages_column=m: ", "one of the two"]),
    ([{"question": 3, "reply": "x"}], {}, ["data.prompt_column=question: row 0 of pairs.jsonl holds 3, not text"]),
    ([ONE], {"cache": "somewhere"}, ["data.cache=somewhere: ", "not cached"]),
])
def test_bad_pairs_are_one_clear_line(tmp_path: Path, rows: list[dict], changes: dict, words: list[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        TextData(pair_settings(tmp_path / "pairs.jsonl", **changes), seed=1)
    assert str(caught.value).startswith(words[0]) or words[0] in str(caught.value), str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_empty_answers_can_be_filtered(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "reply": "yes" if i % 3 else ""} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = TextData(pair_settings(tmp_path / "pairs.jsonl", filters={"reply": "!="}), seed=1)
    assert sum(1 for _ in data.streams[0].source.documents()) + sum(1 for _ in data.streams[0].source.held_out()) == 40


@pytest.mark.parametrize(("messages", "template", "changes", "words"), [
    ([[("user", "hello?")]], SMOLLM2, {}, ["data.source=", "no conversation with an answer in column 'messages'"]),
    ([[("user", "hello?"), ("assistant", "")]], SMOLLM2, {}, ["data.messages_column=messages: row 0", "empty answer"]),
    ([[("system", "be nice"), ("assistant", "ok")]], INSTRUCT, {}, ["data.tokenizer=", "refuses the conversation", "Only"]),
    (CHATS[:1], None, {}, ["data.messages_column=messages: ", "has no chat template"]),
    (CHATS[:1], "{% if %}", {}, ["data.tokenizer=", "chat template cannot be read"]),
    (CHATS[:1], "{% for m in messages %}{{ m.role }}{% endfor %}", {}, ["data.tokenizer=", "does not show what"]),
    (CHATS[:1], "{{ messages[0].content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}", {},
     ["data.source=", "the mask hides every token"]),
    (CHATS[:1], "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", {"separate_documents": True},
     ["data.separate_documents=true: ", "inside a conversation"]),
    (CHATS[:1], "{{ ().__class__.__base__ }}", {}, ["data.tokenizer="]),
])
def test_bad_conversations_are_one_clear_line(tmp_path: Path, messages: list, template: str | None, changes: dict,
                                              words: list[str]) -> None:
    lines = [json.dumps({"messages": chat(turns)}) for turns in messages * 40]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    settings = pair_settings(tmp_path / "chats.jsonl", prompt_column=None, answer_column=None, messages_column="messages",
                             tokenizer=str(folder_of(tmp_path / "chat", template)),
                             validation_source=str(tmp_path / "chats.jsonl"), **changes)
    with pytest.raises(UserError) as caught:
        TextData(settings, seed=1)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_messages_of_another_shape_are_one_clear_line(tmp_path: Path) -> None:
    tokenizer = str(folder_of(tmp_path / "chat", SMOLLM2))
    for rows, words in [([{"messages": "hello"}], "not a list of messages"),
                        ([{"messages": [{"from": "human", "value": "hello"}]}], "not a message with role and content")]:
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = str(tmp_path / "chats.jsonl")
        with pytest.raises(UserError, match=f"data.messages_column=messages: .*{words}"):
            TextData(TextDataSettings(source=source, messages_column="messages", tokenizer=tokenizer, lanes=1), seed=1)
