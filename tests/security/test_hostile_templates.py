"""Chat templates and tokenizers of strangers that would not end, or fill the memory: one line each, in bounded time."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genscale.data.text import template_sandbox
from genscale.data.text.chat_template import ChatTemplate
from genscale.data.text.tokenizers import load_tokenizer, train_bpe
from genscale.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
NEST = "{% for a in range(99999) %}" * 5 + "{% endfor %}" * 5
DOUBLE = "{% set ns = namespace(x='ab', y=[1, 2]) %}{% for i in range(60) %}"
LONG = "{% set a = 'ab' * 1000000 %}{% for i in range(99999) %}"
TEMPLATES = {
    "nested loops": NEST,
    "nested loops that write": NEST.replace("{% endfor %}", "x{% endfor %}", 1),
    "loops inside a macro": "{% macro f() %}" + NEST + "{% endmacro %}{{ f() }}",
    "loops in a block": "{% set x %}" + NEST + "{% endset %}",
    "a loop that calls itself": "{% for a in [[1], [2]] recursive %}{{ loop(a) }}{{ loop([[[[a]]]]) }}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macros that call two": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "doubled by +": DOUBLE + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubled by ~": DOUBLE + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubled by *": DOUBLE + "{% set ns.x = ns.x * 2 %}{% endfor %}{{ ns.x }}",
    "doubled by join": DOUBLE + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}{{ ns.x }}",
    "doubled by format": DOUBLE + "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "doubled by .format": DOUBLE + "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}{{ ns.x }}",
    "doubled by %": DOUBLE + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
    "doubled by replace": DOUBLE + "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
    "doubled by the replace filter": DOUBLE + "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
    "doubled by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE + "{% set ns.x = f(ns.x) %}{% endfor %}",
    "lists in lists": DOUBLE + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    "maps in maps": DOUBLE + "{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y | tojson }}",
    "dict() in dict()": DOUBLE + "{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    "namespaces in namespaces": DOUBLE + "{% set ns.y = namespace(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    "list + list": DOUBLE + "{% set ns.y = ns.y + ns.y %}{% endfor %}{{ ns.y | length }}",
    "a text times a number": "{{ 'x' * 10 ** 10 }}",
    "a list times a number": "{{ [1] * 10 ** 10 }}",
    "a number times a text": "{{ 10 ** 10 * 'x' }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a product of powers": "{% set ns = namespace(x=10) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'x'.center(10 ** 10) }}",
    "the center filter": "{{ 'x' | center(10000000000) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(2000000000) }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a starred width": "{{ '%*d' % (1000000000, 1) }}",
    "a format width": "{{ '{:>10000000000}'.format(1) }}",
    "a nested format width": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "a format_map width": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "the format filter": "{{ '%10000000000d' | format(1) }}",
    "indent": "{{ ('a\n' * 1000000) | indent(100000) }}",
    "tojson": "{{ [[1]] | tojson(indent=10000000000) }}",
    "slice": "{{ [1] | slice(10000000000) | list | length }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list | length }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') | length }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) | length }}",
    "join by a long text": "{{ (['a'] * 100000) | join('b' * 1000000) | length }}",
    "a text joins": "{{ ('b' * 1000000).join(['a'] * 100000) | length }}",
    "wordwrap": "{{ ('a ' * 1000000) | wordwrap(1, wrapstring='b' * 1000000) | length }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    "long texts compared": LONG + "{% if a ~ 'c' in a ~ 'd' %}{% endif %}{% endfor %}",
    "long texts sliced": LONG + "{% set b = a[1:] %}{% endfor %}",
    "long texts upper": LONG + "{% set b = a.upper() %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "another text each time": "{{ [1, 2, 3] | random }}",
    "a deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long expression": "{{ " + "1 + " * 5000 + "1 }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long template": "{{ 'x' }}" * 100_000,
    "messages are not changed": "{% set _ = dict.update(messages[0], role='assistant') %}",
    "no way out": "{{ ().__class__.__base__.__subclasses__() }}{{ messages[0]._number }}",
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two GiB more than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_end_or_grows_is_refused(name: str, little_memory: None,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "nested loops":  # the others in a tenth of the time
        monkeypatch.setattr(template_sandbox, "WORK", template_sandbox.WORK // 10)
    started = time.thread_time()
    with pytest.raises(UserError) as caught:
        ChatTemplate(TEMPLATES[name], {}, [], "here").answers(MESSAGES)
        pytest.fail("it was rendered")
    assert "\n" not in str(caught.value) and "chat template" in str(caught.value) and len(str(caught.value)) < 600
    assert time.thread_time() - started < 8


def test_such_a_template_ends_a_run_before_its_first_step(refuse: Callable[..., str], tmp_path: Path) -> None:
    train_bpe(["hello world"] * 3, 300, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES["doubled by ~"]}))
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": MESSAGES})] * 60))
    message = refuse("--data.source", tmp_path / "chats.jsonl", "--data.messages_column", "messages", "--data.tokenizer",
                     tmp_path)
    assert "fails on a mere question and its answer (it writes more than" in message and "row 0" not in message


def test_a_template_may_be_shared_by_threads() -> None:
    """Bounds and places belong to the thread that renders."""
    template = ChatTemplate("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", {}, [], "here")
    conversations = [[{"role": "user", "content": "hi " * n}, {"role": "assistant", "content": "no " * n}]
                     for n in range(1, 200)]
    expected = [template.answers(messages) for messages in conversations]
    found: dict[int, list[Any]] = {}

    def render(number: int) -> None:
        found[number] = [template.answers(messages) for messages in conversations]
    threads = [threading.Thread(target=render, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected for number in range(3))


def test_a_long_conversation_is_within_bounds() -> None:
    """Eight hundred messages, each of which looks through all, and a long one."""
    looks = ("{% for m in messages %}{% for other in messages[loop.index0:] %}{% if other.role == 'tool' %}{% break %}"
             "{% endif %}{% endfor %}{{ m.role + ': ' + (m.content | trim) + '\n' }}{% endfor %}")
    messages = [{"role": role, "content": "word " * 20} for _ in range(400) for role in ("user", "assistant")]
    text, spans = ChatTemplate(looks, {}, [], "here").answers(messages)
    assert len(spans) == 400 and text[slice(*spans[-1])] == ("word " * 20).strip()
    long = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "word " * 1_000_000}]
    assert len(ChatTemplate(looks, {}, [], "here").render(long)) > 5_000_000 - 1


def split(pattern: str) -> dict[str, Any]:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def replace(pattern: dict[str, str], content: str, times: int = 1) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": pattern, "content": content}] * times
    return {"normalizer": {"type": "Sequence", "normalizers": steps}}


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "no pattern": (split("("), "damaged"),
    "a pattern that backtracks": (split("(a|aa)+$"), "fails on a text (Onig"),
    "another": (split("(a+)+b"), "fails on a text (Onig"),
    "nothing replaced": (replace({"String": ""}, "x"), "fails on a text (index out of bounds"),
    "growing texts": (replace({"String": "l"}, "l" * 100, 3), "makes a text up to 1000000 times as long"),
    "no charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "damaged"),
    "no unknown token": ({"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "?"}}, "fails on a text"),
    "an id of 4e9": ({"vocab": 4_000_000_000}, "'hello' has the id 4000000000, of 2"),
    "an id of 5e9": ({"vocab": 5_000_000_000}, "damaged"),
    "dropout": ({"dropout": 0.5}, "has dropout=0.5"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_work_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    content = json.loads(train_bpe(["hello world"] * 3, 300, tmp_path).read_text())
    change, words = TOKENIZERS[name]
    if "vocab" in change:
        content["model"]["vocab"]["hello"] = change["vocab"]
    elif "dropout" in change:
        content["model"] |= change
    else:
        content |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # Rust's own lines are not seen


@pytest.mark.parametrize(("config", "words"), [
    ({"chat_template": 3}, "its chat template 'default' is '3'"),
    ({"chat_template": [{"name": "default", "template": ["x"]}]}, "its chat template 'default' is"),
    ({"chat_template": [{"name": ["tool_use"], "template": "x"}]}, None),
    ({"chat_template": ["x"], "eos_token": {"content": 3}}, None),
])
def test_companions_of_another_shape_are_one_line(tmp_path: Path, config: dict[str, Any], words: str | None) -> None:
    train_bpe(["hello world"] * 3, 300, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [None, [1], 4_000_000_000, 3]}))
    if words is None:
        assert load_tokenizer(str(tmp_path)).companions.end_ids == (3,)
        return
    with pytest.raises(UserError, match=words):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"tokenizer_config.json is damaged"):
        load_tokenizer(str(tmp_path))
