"""What `genscale`, its verbs and their --help say about themselves."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from genscale import __version__
from genscale.cli import VERBS
from genscale.evaluation.image_sampling import ImageSampling
from genscale.evaluation.image_scores import ImageScoring
from genscale.families import family
from genscale.families.gpt.sampling import TextSampling
from genscale.settings.keys import as_key
from genscale.settings.parser import COMMON_SECTIONS
from genscale.verbs.export import ExportSettings
from genscale.verbs.tokenizer import TokenizerSettings

ROOT = Path(__file__).resolve().parents[1]


def done(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


def settings_of(settings: Any, prefix: str = "--") -> list[str]:
    """Every flag of a settings dataclass."""
    found = []
    for field in dataclasses.fields(settings):
        default = field.default_factory() if callable(field.default_factory) else field.default
        nested = dataclasses.is_dataclass(default)
        found += settings_of(default, f"{prefix}{field.name}.") if nested else [f"{prefix}{as_key(field.name)}"]
    return found


def test_help_of_train_lists_every_setting_with_meaning_type_and_default(genscale):
    text = done(genscale("train", "--help"))
    sections = {**COMMON_SECTIONS, "model": family("gpt").model_settings, "data": family("gpt").data_settings}
    wanted = [flag for name, section in sections.items() for flag in settings_of(section, f"--{name}.")]
    assert len(wanted) > 50
    listed = re.split(r"\n  (?=--)", text.split("options:")[-1])
    entries = {entry.split()[0].rstrip(","): " ".join(entry.split()) for entry in listed}  # `--a X, --a+ X`, or `--a, --a+ X`
    for flag in wanted:
        assert re.search(r"\w{2,} .*\((.*type: .*|.*default: .*)\)", entries[flag]), entries.get(flag)
    assert "Optimizer steps in all. (type: PositiveInt, default: 1000)" in entries["--train.steps"]
    assert "--config" in entries and "--print_config" in entries


@pytest.mark.parametrize(("words", "settings"), [
    (["sample"], TextSampling), (["sample"], ImageSampling), (["evaluate"], ImageScoring),
    (["export"], ExportSettings), (["tokenizer"], TokenizerSettings),
    (["tokenizer", "train"], TokenizerSettings),
])  # fmt: skip
def test_help_of_a_verb_lists_every_setting(words, settings, genscale):
    text = done(genscale(*words, "--help"))
    for flag in settings_of(settings):
        assert re.search(rf"^  {re.escape(flag)}\b", text, re.MULTILINE), flag


def test_help_of_the_others(genscale):
    assert "--data.validation_source" in done(genscale("evaluate", "--help"))
    assert re.search(r"list.*verify.*digest", done(genscale("checkpoint", "--help")), re.DOTALL)
    assert "path" in done(genscale("checkpoint", "digest", "--help"))
    for flag in ("-h", "--help"):
        overview = done(genscale(flag))
        assert all(verb in overview and meaning in overview for verb, meaning in VERBS.items())


def test_an_unknown_verb_names_the_nearest(genscale):
    message = genscale("trian", "--config", "x").message()
    assert "'trian'" in message and "did you mean 'train'" in message
    nothing = genscale()
    assert nothing.code == 2 and all(verb in nothing.out + nothing.err for verb in VERBS)


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "genscale", "--version"]
    started = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (started.returncode, started.stdout.strip()) == (0, __version__)
