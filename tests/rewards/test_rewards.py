"""What rewards say of answers and pictures, and what a config may say of rewards."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import pkgutil
import random
import re
import subprocess
import sys

import pytest
import torch

import genscale.rewards
from genscale.errors import UserError
from genscale.rewards import collection, entries
from genscale.rewards.arithmetic import value_of
from genscale.rewards.base import Answer, ImageReward, TextReward
from genscale.rewards.collection import build_rewards
from genscale.rewards.grammar import Sentences
from genscale.rewards.registry import REWARDS
from genscale.rewards.schema import check_schema, fits
from genscale.rewards.texts import last_number
from genscale.settings.parser import settings_of


def answer(text: str, member: int = 0, ended: bool = True, **row: object) -> Answer:
    return Answer("?", text, row, ended, 7, member)


def worth(text: str, name: str, row: dict[str, object] | None = None, **settings: object) -> float:
    """What a reward of a config says of a text."""
    _, total = build_rewards([{"name": name, **settings}], "text").score(1, [answer(text, **(row or {}))])
    return total.item()


@pytest.mark.parametrize("module", [each.name for each in pkgutil.iter_modules(genscale.rewards.__path__)])
def test_the_examples_run(module):
    assert doctest.testmod(importlib.import_module(f"genscale.rewards.{module}")).failed == 0


@pytest.mark.parametrize(("text", "name", "row", "settings", "value"), [
    ("b", "exact", {"answer": ["a", "b"]}, {}, 1),
    (" b", "exact", {"answer": "b"}, {"strip": False}, 0),
    ("STRASSE", "exact", {"right": "straße"}, {"column": "right", "casefold": True}, 1),
    ("", "exact", {"answer": ""}, {}, 1),
    ("2e400", "numeric", {"answer": 1}, {}, 0),
    ("the answer is 18.", "numeric", {"answer": "9 * 2 = 18\n#### 18"}, {}, 1),
    ("101", "numeric", {"answer": 100}, {"relative": 0.01}, 1),
    ("٣", "numeric", {"answer": 3}, {}, 0),
    ("one two", "length", {}, {"target": 3, "unit": "words", "tolerance": 1}, 0),
    ("", "length", {}, {"target": 0}, 0),
    ("abcabc", "repetition", {}, {"n": 3, "unit": "characters"}, -0.25),
    ("x7y", "regex", {}, {"pattern": "[0-9]", "where": "anywhere"}, 1),
    ("7\n", "regex", {}, {"pattern": "[0-9]"}, 0),
    ("<<>>", "balanced", {}, {"pairs": ["<>"], "only": True}, 1),
    ("<x>", "balanced", {}, {"pairs": ["<>"], "only": True}, 0),
    ("(" * 9 + ")" * 9, "balanced", {}, {"deepest": 8}, 0),
    ("6 / (1 - 3/4) = 24", "arithmetic", {"answer": 24, "numbers": [1, 3, 4, 6]}, {"numbers": "numbers"}, 1),
    ("6*4 = 25 = 24", "arithmetic", {"answer": 24}, {}, 0),
    ('{"a": 1, "a": 2}', "json", {}, {}, 0),
    ("[NaN]", "json", {}, {}, 0),
    ("[1e999]", "json", {}, {"schema": {"items": {"type": "number"}}}, 0),
    ("[" * 100_000, "json", {}, {}, 0),
    ('{"a":' * 100_000, "json", {}, {}, 0),
    ("9" * 400, "json", {}, {"schema": {"type": "integer", "minimum": 0.5}}, 1),
    ("9" * 5000, "json", {}, {"schema": {"type": "integer"}}, 0),
    ("9" * 400, "numeric", {"answer": 1}, {}, 0),
    ("__import__('os')", "arithmetic", {"answer": 0}, {}, 0),
    ("2**-1000000000", "arithmetic", {"answer": 0}, {}, 1),
])  # fmt: skip
def test_what_answers_are_worth(text, name, row, settings, value):
    assert worth(text, name, row, **settings) == pytest.approx(value)


def test_arithmetic_is_pythons_for_a_thousand_expressions():
    drawn = random.Random(5)

    def expression(depth: int) -> str:
        if depth == 0:
            return str(drawn.randrange(20))
        kind = drawn.randrange(4)
        if kind == 0:
            return f"({expression(depth - 1)})"
        if kind == 1:
            return f"-{expression(depth - 1)}"
        sign = drawn.choice(["+", "-", "*", "/", "//", "%"])
        return f"{expression(depth - 1)} {sign} {expression(depth - 1)}"

    for text in (expression(drawn.randrange(1, 5)) for _ in range(1000)):
        try:
            wanted = float(eval(re.sub(r"([0-9]+)", r"\1.0", text)))  # of our own making
        except ZeroDivisionError:
            wanted = None
        assert value_of(text) == wanted, text
    others = ("2**3**2", "-2**2", "(-8)**0.5", "10**400", "(" * 60 + "1" + ")" * 60, "1 if 1 else 2")
    assert [value_of(text) for text in others] == [512, -4, None, None, None, None]
    assert last_number("3-4") == 4 and last_number("12,34") == 34


def test_grammar_and_regular_expression_agree_on_all_short_texts():
    """Two readers that share no line: every text of up to five of four characters."""
    rules = Sentences({"sum": 'number (("+" | "-") number)*', "number": '"-"? digit+', "digit": "[12]"})
    pattern = re.compile(r"-?[12]+([+-]-?[12]+)*")
    texts = [""]
    for _ in range(5):
        texts += [text + sign for text in texts if len(text) == len(texts[-1]) for sign in "12+-"]
    wrong = [text for text in texts if rules.holds(text) != bool(pattern.fullmatch(text))]
    assert wrong == [] and sum(map(rules.holds, texts)) > 100
    nest = Sentences({"nest": '"(" nest ")" nest |'})  # which no regular expression knows
    assert [nest.holds(text) for text in ("", "()(())", "(()", ")(")] == [True, True, False, False]


@pytest.mark.parametrize(("value", "schema", "right"), [
    (1.0, {"type": "integer"}, True), (True, {"type": "integer"}, False), (True, {"enum": [1]}, False),
    ({"a": 1, "b": 2}, {"properties": {"a": {}}, "additionalProperties": False}, False),
    ([1, 1.0], {"uniqueItems": True}, False),
    (5, {"oneOf": [{"minimum": 5}, {"maximum": 5}]}, False), (5, {"not": {"type": "string"}}, True),
    (0.3, {"multipleOf": 0.1}, True), ("é", {"maxLength": 1}, True), (7, {"maxLength": 1, "required": ["x"]}, True),
    ("ab", {"pattern": "^a"}, True), ([], {"items": False}, True), (None, {"type": ["null", "object"]}, True),
    (1, False, False), (10**400, {"multipleOf": 0.5}, False), (10**400, {"multipleOf": 10}, True),
    (1e308, {"multipleOf": 1e-300}, False), (10**400, {"maximum": 1e308}, False),
])  # fmt: skip
def test_schemas_say_what_the_standard_says(value, schema, right):
    check_schema(schema, "schema")
    assert fits(value, schema) is right


@pytest.mark.parametrize(("text", "name", "row", "settings", "why"), [
    ("a" * 400, "grammar", {}, {"rules": {"s": "s s s | s s | 'a' | ''"}}, "rules: an answer of 400 .* than 2,000,000 steps"),
    ("4", "arithmetic", {"answer": 4, "n": ["x"]}, {"numbers": "n"}, r"numbers: 'n' holds \['x'\] in the row of sample 7"),
    ("9" * 400, "numeric", {"answer": "9" * 400}, {}, "column: 'answer' holds no number in the row of sample 7"),
    (["1" * 40], "json", {}, {"schema": {"items": {"pattern": "(?:[0-9]|[0-9]{2})+(?<=z)"}}},
     r"schema.pattern: .* took more than 0.2 seconds for a text of 40 characters: it backtracks"),
])  # fmt: skip
def test_what_would_take_for_ever_or_has_no_answer_is_said_in_a_line(text, name, row, settings, why, monkeypatch):
    monkeypatch.setattr("genscale.rewards.schema.SECONDS", 0.2)
    with pytest.raises(UserError, match=rf"objective.rewards\[0\] \({name}\): {why}"):
        worth(text if isinstance(text, str) else json.dumps(text), name, row, **settings)


@pytest.mark.slow
def test_a_pattern_that_calls_itself_without_end_is_stopped_by_its_memory():
    """Of which the matcher allows itself a gigabyte."""
    for pattern in ("(?R)", "(?<x>(?&x))"):
        with pytest.raises(UserError, match="took more memory than a pattern may for a text of 9 characters: it calls itself"):
            worth("a" * 9, "regex", pattern=pattern)


@pytest.mark.parametrize(("given", "message"), [
    ("exact", r"objective.rewards: must be a list of rewards like \[\{name: exact\}\], not 'exact'"),
    (["exact"], r"objective.rewards\[0\]: must be a mapping like \{name: exact, weight: 1\}, not 'exact'"),
    ([{"weight": 1}], r"objective.rewards\[0\].name: must be the name of a reward, not None; `genscale rewards` lists them"),
    ([{"name": "exact"}, {"name": "exact", "weight": math.nan}], r"objective.rewards\[1\].weight: must be a finite number"),
    ([{"name": "exact", "weight": 10**400}], r"objective.rewards\[0\].weight: must be a finite number, not 1000"),
    ([{"name": "exact", "colum": "x"}], r"objective.rewards\[0\].colum: unknown key \(did you mean 'column'\?\)"),
    ([{"name": "length"}], r"objective.rewards\[0\].target: must be set"),
    ([{"name": "length", "target": "long"}], r"objective.rewards\[0\].target: must be a whole number, not long"),
    ([{"name": "length", "target": -1}], r"objective.rewards\[0\].target: must be at least 0, not -1"),
    ([{"name": "regex", "pattern": "("}], r"objective.rewards\[0\].pattern: '\(' is no regular expression"),
    ([{"name": "regex", "pattern": "((a{999}){999}){9}"}], r"objective.rewards\[0\].pattern: .* product of its counts"),
    ([{"name": "json", "schema": {"properties": {"a": {"$ref": "http://x"}}}}],
     r"objective.rewards\[0\].schema.properties.a.\$ref: is no keyword that is heeded here"),
    ([{"name": "grammar", "rules": {"a": "b"}}], r"objective.rewards\[0\].rules.a: 'b' is no rule"),
    ([{"name": "exact"}] * 65, "names 65 rewards; at most 64"),
])  # fmt: skip
def test_a_mistake_in_a_config_is_one_line_with_its_key(given, message):
    with pytest.raises(UserError, match=message):
        entries.completed(given)


def test_what_a_policy_cannot_be_judged_by_is_refused_with_what_it_can():
    with pytest.raises(UserError, match=r"rewards\[0\].name: 'exakt' is not one of exact, .*did you mean 'exact'.*no code"):
        build_rewards([{"name": "exakt"}], "text")
    with pytest.raises(UserError, match=r"rewards\[1\].name: 'brightness' does not judge texts, .*one of exact, "):
        build_rewards([{"name": "exact"}, {"name": "brightness"}], "text")
    with pytest.raises(UserError, match="'exact' does not judge pictures, which this policy makes; choose one of brightness"):
        build_rewards([{"name": "exact"}], "images")
    with pytest.raises(UserError, match="objective.rewards: names no reward; give one"):
        build_rewards([], "text")


def test_every_default_is_written_out_and_stands_as_it_is():
    once = entries.completed([{"name": "length", "target": 3}, {"name": "somebody's", "x": 1}])
    assert once == [{"name": "length", "weight": 1.0, "target": 3, "tolerance": 0, "unit": "characters"},
                    {"name": "somebody's", "weight": 1.0, "x": 1}]
    assert entries.completed(once) == once


def test_a_config_is_read_without_torch():
    script = ("import sys; from genscale.rewards.entries import completed; from genscale.verbs.rewards import main; "
              "completed([{'name': 'exact'}, {'name': 'classifier', 'run': 'r', 'label': '3'}]); main([]); "
              "sys.exit('torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 0


def test_parts_are_named_weighed_and_alike_whatever_stands_beside():
    rewards = build_rewards([{"name": "exact"}, {"name": "regex", "pattern": "a+", "weight": 0.5},
                             {"name": "regex", "pattern": "b+", "weight": -2}], "text")
    assert rewards.names == ["exact", "regex", "regex_2"]
    answers = [answer(text, member, answer="a") for member, text in enumerate(["a", "b", "c"])]
    parts, total = rewards.score(1, answers)
    assert parts.dtype == total.dtype == torch.float32
    assert parts.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]] and total.tolist() == [1.5, -2, 0]
    assert [rewards.score(1, [each])[1].item() for each in answers] == total.tolist()
    assert rewards.score(1, [])[0].shape == (0, 3)


class Wordy(TextReward):
    """How many words there are."""

    def judge(self, answers):
        return [len(each.text.split()) for each in answers]


class Blue(ImageReward):
    """How blue a picture is."""

    def judge(self, images):
        return images[:, 2].mean((1, 2))


def test_what_a_script_gives_judges_while_it_trains():
    with REWARDS.knowing({"wordy": Wordy, "blue": Blue, "first": lambda judged: [1] * len(judged)}):
        rewards = build_rewards([{"name": "wordy"}, {"name": "first", "weight": 3}], "text")
        assert rewards.score(1, [answer("two words")])[1].item() == 5
        pictures = build_rewards([{"name": "blue"}, {"name": "first"}, {"name": "brightness", "target": 0.5}], "images")
        parts, _ = pictures.score(1, torch.full((2, 3, 4, 4), 0.25), torch.tensor([5, 6]), torch.tensor([0, 0]))
        assert parts.tolist() == [[0.25, 1, -0.25]] * 2
        assert set(REWARDS.origin("wordy")) == {"name", "script"} and REWARDS.origin("exact") == {}
        with pytest.raises(UserError, match=r"rewards\[0\].words: unknown key; it has no settings"):
            build_rewards([{"name": "wordy", "words": 1}], "text")
    assert "wordy" not in REWARDS
    for given, message in (({"exact": Wordy}, "'exact' is a built-in reward"), ({"mine": dict}, "must be a function of a list"),
                           ({"mine": "os.system"}, "'mine' is 'os.system'; it must be a function")):
        with pytest.raises(UserError, match=message), REWARDS.knowing(given):
            pass


@pytest.mark.parametrize(("judge", "why"), [
    (lambda answers: [math.nan], "gave nan, for number 1 of 1"), (lambda answers: [1, 2], "gave 2 numbers for 1"),
    (lambda answers: None, "gave None, not a number for each of 1"), (lambda answers: ["x"], r"gave \['x'\], not a number"),
    (lambda answers: ["0.5"], r"gave \['0.5'\], not a number"), (lambda answers: "1", "gave '1', not a number for each of 1"),
    (lambda answers: {1: 0.5}, r"gave \{1: 0.5\}, not a number"),
    (lambda answers: 1 / 0, r"ZeroDivisionError: division by zero in .*test_rewards.py, line \d+"),
])  # fmt: skip
def test_a_judge_that_fails_is_asked_again_and_then_named(judge, why, caplog):
    calls = []
    with REWARDS.knowing({"mine": lambda answers: calls.append(1) or judge(answers)}):
        with pytest.raises(UserError, match=rf"objective.rewards\[0\] \(mine\): {why}.*; asked 3 times; mend it"):
            build_rewards([{"name": "mine"}], "text").score(1, [answer("x")])
        assert len(calls) == 3 and sum("it is asked again" in line for line in caplog.messages) == 2
    calls.clear()
    with REWARDS.knowing({"mine": lambda answers: [1.0] if calls else calls.append(1)}):  # the second time it is well
        assert build_rewards([{"name": "mine"}], "text").score(1, [answer("x")])[1].item() == 1


def test_the_verb_lists_them_with_their_settings(genscale):
    out = genscale("rewards").out
    for name in REWARDS:
        assert re.search(rf"^{name} +(text|images) +\S", out, re.M), name
    assert "column (str, default 'answer'): Column of the prompt's row that holds the right answer" in out
    assert all((cls := REWARDS[name]).__doc__ and settings_of and cls.settings.__doc__ for name in REWARDS)
    assert "has none" in genscale("rewards", "exact").message()
    assert collection.names_of("images") == ["brightness", "classifier"]


def test_an_installed_packages_reward_is_chosen_by_its_name(tmp_path, monkeypatch):
    about = tmp_path / "polite-0.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: polite\nVersion: 0.3\nSummary: Politeness\n")
    points = "[genscale.rewards]\npolite = polite:Polite\nrude = polite:rude\ngone = gone:Gone\n"
    (about / "entry_points.txt").write_text(points)
    (tmp_path / "polite.py").write_text(
        "from dataclasses import dataclass\nfrom genscale import TextReward\n"
        "@dataclass\nclass Settings:\n    '''What is polite.'''\n    word: str = 'please'\n    '''The word.'''\n"
        "class Polite(TextReward):\n    '''1 where a word is there.'''\n    settings = Settings\n"
        "    def judge(self, answers):\n        return [float(self.asked.word in each.text) for each in answers]\n"
        "rude = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert entries.completed([{"name": "polite"}]) == [{"name": "polite", "weight": 1.0, "word": "please"}]
    rewards = build_rewards([{"name": "polite", "word": "thanks"}], "text")
    assert rewards.score(1, [answer("no thanks")])[1].item() == 1
    assert rewards.origins() == {"polite": {"name": "polite", "package": "polite", "version": "0.3"}}
    for name, why in (("rude", "is no Reward"), ("gone", "cannot be loaded .ModuleNotFoundError")):
        with pytest.raises(UserError, match=rf"objective.rewards\[0\].name: '{name}' of package polite==0.3 {why}"):
            entries.completed([{"name": name}])
    assert "polite" in collection.names_of("text") and "gone" not in collection.names_of("text")
