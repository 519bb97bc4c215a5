"""What a config says is what YAML 1.2 says, in bounded time, and nothing but itself: no other file, no key lost."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.reading import Unreadable, dump_yaml, parse_json, parse_yaml, read_bytes
from genscale.settings.numbers import check_numbers, with_plain_numbers
from genscale.settings.parser import load_config, parse_config
from genscale.supervise.run_folder import config_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghij", "bcdefghijk", strict=True))
NUMBERS = {"010": 10, "0o10": 8, "0x10": 16, "1e3": 1000, "+7": 7, "1.0": 1, "1e18": 10**18}
NO_NUMBERS = ["1:30", "1_000", "0b11", "1,000", "٣", "²", "10 000", "1__0"]


def config_of(text: str, tmp_path: Path, *flags: str):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return parse_config(FAMILIES, ["--config", str(file), *flags])


def refused(text: str, tmp_path: Path, *flags: str) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        config_of(text, tmp_path, *flags)
    assert time.monotonic() - started < 5
    return str(caught.value)


# --- YAML 1.2, core schema (https://yaml.org/spec/1.2.2, section 10.3.2) --------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [
    ("null", None), ("Null", None), ("~", None), ("", None), ("nULL", "nULL"), ("true", True), ("False", False), ("yes", "yes"),
    ("off", "off"), ("On", "On"), ("n", "n"), ("010", 10), ("0o10", 8), ("0x1F", 31), ("0b11", "0b11"), ("+1", 1), ("-0", 0),
    ("1_000", "1_000"), ("1:30", "1:30"), ("12:30:45", "12:30:45"), ("1e-3", 1e-3), ("1E5", 1e5), (".5", 0.5), ("+.5", 0.5),
    ("1.", 1.0), ("1.e3", 1000.0), ("1:30.5", "1:30.5"), ("-.INF", float("-inf")), (".inf", float("inf")), ("inf", "inf"),
    ("2024-01-01", "2024-01-01"), ("2001-12-14 21:59:43.10 -5", "2001-12-14 21:59:43.10 -5"), ("=", "="), ("!!str 5", "5"),
    ("'010'", "010"), ('"true"', "true"), ("08", 8), ("1e", "1e"), ("0x", "0x"), ("-", [None]), ("٣", "٣")])
def test_a_scalar_is_what_version_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", [
    "010", "1e-3", "0o10", "1:30", "yes", "0x1", "", "~", "null", ".5", "1.", "2024-01-01", "=", "<<", "a: b", "# x", "Größe",
    "\n x", "x\n", "1_0", "0b1", ".inf", ".nan", "nan", "- a", "off", "-", "\u2028", "a\u0085b", "\u2029", "😀", "'", '"',
    "+.5", "1e5", "-1E3", "x\x07", "\ufeffa", "!a", "&a", "*a", "%a", "@a", "`a", " a ", "a\tb", "[", "{}", "08", "1.5", "Null",
    True, None, 1e-5, 1e22, 5e-324, 0.1, 0, -3, 2**63])
def test_what_is_written_reads_back_by_either_version(text: object) -> None:
    content = {"key": text, "list": [text, {"deeper": text}]}
    for written in (dump_yaml(content), dump_yaml(content, allow_unicode=True)):
        assert parse_yaml(written) == content == yaml.safe_load(written)
        assert type(parse_yaml(written)["key"]) is type(text)


def test_a_config_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = config_of("run: {name: '1e3', dir: '0o17'}\ndata: {column: 'off', filters: {a: '010', b: 1.0e-3}}\n", tmp_path)
    file = tmp_path / "written.yaml"
    file.write_text(config_yaml(config))
    again = load_config(FAMILIES, file)
    assert again == config and again.run.name == "1e3" and again.data.filters == {"a": "010", "b": 1e-3}
    assert yaml.safe_load(file.read_text())["run"]["dir"] == "0o17"


def test_a_number_is_the_same_in_a_file_and_after_a_flag(tmp_path: Path) -> None:
    keys = ["steps", "log_every", "global_batch_size", "checkpoint_keep", "evaluate_every", "sample_every", "checkpoint_every"]
    pairs = dict(zip(keys, NUMBERS, strict=True))
    flags = [word for key, text in pairs.items() for word in (f"--train.{key}", text)]
    lines = [f"  {key}: {text}" for key, text in pairs.items()]
    for config in (config_of("\n".join(["train:", *lines]), tmp_path),
                   config_of("run: {seed: 1}", tmp_path, *flags),
                   config_of("run: {seed: 1}", tmp_path, *(f"--train.{key}={text}" for key, text in pairs.items()))):
        assert {key: getattr(config.train, key) for key in keys} == {key: NUMBERS[text] for key, text in pairs.items()}


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_what_only_python_or_version_1_1_takes_for_a_number_is_none(text: str) -> None:
    keys = {"train.steps", "optimizer.betas"}
    for check in (lambda: check_numbers({"train": {"steps": text}}, keys), lambda: check_numbers({"train.steps": text}, keys),
                  lambda: with_plain_numbers(["--train.steps", text], keys),
                  lambda: with_plain_numbers([f"--train.steps={text}"], keys),
                  lambda: check_numbers({"optimizer": {"betas": [0.9, text]}}, keys)):
        with pytest.raises(UserError, match=r"^(train.steps|optimizer.betas): must be a number, not ") as caught:
            check()
        assert text in str(caught.value)


def test_both_are_asked(tmp_path: Path) -> None:
    assert refused("train: {steps: 1:30}", tmp_path).startswith("train.steps: must be a number, not '1:30'")
    assert refused("run: {seed: 1}", tmp_path, "--train.steps", "1_000").startswith("train.steps: must be a number, not '1_0")


@pytest.mark.parametrize(("flag", "text", "words"), [
    ("train.steps", "~", "a whole number of at least 1, not "), ("train.steps", "5.5", "at least 1, not "),
    ("train.steps", "[5]", "at least 1, not a list"), ("train.steps", "{a: 5}", "at least 1, not a mapping"),
    ("train.steps", "9" * 400, "at most 9223372036854775807, not 999"), ("optimizer.lr", "9" * 400, "at most 922"),
    ("optimizer.betas", f"[{'9' * 400}, 0.9]", "at most 922"), ("optimizer.betas", "[0.9]", "a list of 2, not [0.9]"),
    ("optimizer.lr_of", f"{{a: {'9' * 400}}}", "at most 922"), ("optimizer.lr_of", "{a: .inf}", "a finite number, not inf"),
    ("optimizer.lr_of", "{a: 1_0}", "a number, not '1_0'"), ("optimizer.lr", "true", "a number above 0, not ")])
def test_what_is_no_number_is_said_in_plain_words(flag: str, text: str, words: str, tmp_path: Path) -> None:
    section, key = flag.split(".")
    for said in (refused(f"{section}: {{{key}: {text}}}", tmp_path), refused("run: {seed: 1}", tmp_path, f"--{flag}", text)):
        assert said.startswith(f"{flag}: must be ") and words in said and len(said) < 200, said
        assert "argument" not in said and "not an" not in said and "not a number" not in said


def test_a_flag_gives_no_key_twice(tmp_path: Path) -> None:
    assert "'a' twice" in refused("run: {seed: 1}", tmp_path, "--optimizer.lr_of", "{a: 1, a: 2}")


# --- nothing is lost, and nothing is taken in from elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    ("train: {steps: 4}\nrun: {seed: 1}\ntrain: {global_batch_size: 16}\n", ["'train' twice", "lines 1 and 3"]),
    ("train: {steps: 4, steps: 5}", ["'steps' twice", "line 1"]),
    ("train:\n  steps: 4\n  clip: 1\n  'steps': 5\n", ["'steps' twice", "lines 2 and 4"]),
    ("data:\n  filters: {a: 1,\n    a: 2}\n", ["'a' twice", "lines 2 and 3"]),
    ("train: {steps: 4}\ntrain.steps: 5\n", ["train.steps", "given twice"]),
    ("train: {clip: 1}\ntrain.steps: 5\n", ["train.steps", "stands beside the section train"]),
    ("run: &r {name: a}\ntrain: {<<: *r, <<: *r}\n", ["'<<' twice"]),
    ("train: {}\ntrain.clip: 5\n", ["stands beside"])])
def test_a_key_that_is_given_twice_is_refused_by_name(text: str, words: list[str], tmp_path: Path) -> None:
    said = refused(text, tmp_path)
    assert all(word in said for word in words), said


def test_merging_is_no_repetition(tmp_path: Path) -> None:
    text = "data:\n  filters:\n    a: &base {x: 1, y: 2}\n    b: {<<: *base, y: 3}\n    c: {<<: *base}\n"
    assert config_of(text, tmp_path).data.filters == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize("words", [
    ("--train.steps", "7", "A", "B"), ("A", "--train.steps", "7", "B"), ("A", "B", "--train.steps", "7"),
    ("--train.steps=7", "=A", "=B"), ("--train.steps", "5", "A", "--train.steps=7", "=B"),
])  # fmt: skip
def test_a_flag_wins_wherever_it_stands_and_a_later_file_over_an_earlier_one(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "A").write_text("train: {steps: 1, log_every: 2, global_batch_size: 8}\n")
    (tmp_path / "B").write_text("model: {family: points}\ntrain: {steps: 3, log_every: 4}\n")
    files = {name: ["--config", str(tmp_path / name)] for name in "AB"}
    files |= {f"={name}": [f"--config={tmp_path / name}"] for name in "AB"}
    config = parse_config(FAMILIES, [part for word in words for part in files.get(word, [word])])
    assert (config.train.steps, config.train.log_every, config.train.global_batch_size) == (7, 4, 8)
    assert config.model.family == "points"


def test_a_file_that_is_not_named_is_said(tmp_path: Path) -> None:
    for words in (["--config"], ["--config", "--train.steps", "5"], ["--config="]):
        with pytest.raises(UserError, match="--config: needs a value"):
            parse_config(FAMILIES, words)


@pytest.mark.parametrize("value", ["SECRET", "[SECRET]", "{train: {steps: 5}}", "5", "null"])
def test_a_config_takes_in_no_other_file(value: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden words: 5\n")
    said = refused(f"config: {value.replace('SECRET', str(secret))}\n", tmp_path)
    assert said.startswith("config: ") and "cannot take in another file" in said and "hidden" not in said


@pytest.mark.parametrize("section", ["model", "train"])
def test_a_section_is_not_read_from_a_file_that_a_flag_or_a_key_names(section: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden: 5\n")
    for said in (refused("run: {seed: 1}", tmp_path, f"--{section}={secret}"), refused(f"{section}: {secret}", tmp_path)):
        assert said.startswith((f"{section}: must be a section", f"--{section}: is a section")) and "hidden" not in said


def test_settings_do_not_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("train: {steps: 77}\n")
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for prefix in ("GENSCALE TRAIN", "GENSCALE_TRAIN", "GENSCALE"):
        monkeypatch.setenv(f"{prefix}_CONFIG", str(other))
        monkeypatch.setenv(f"{prefix}_TRAIN__STEPS", "77")
    assert config_of("run: {seed: 1}", tmp_path).train.steps == 1000


@pytest.mark.parametrize("text", ["train: !include other.yaml", "!!python/object/apply:os.system ['true']", "a: !!binary aGk=",
                                  "train: !!set {a}", "a: !!timestamp 2001-01-01"])
def test_tags_are_refused(text: str, tmp_path: Path) -> None:
    assert "could not determine a constructor for the tag" in refused(text, tmp_path)


# --- in bounded time and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "words"), [
    (BOMB, "aliases"), (f"run: {{name: x}}\n{BOMB}", "aliases"), ("[" * 100_000, "levels deep"), ("- " * 50_000, "levels deep"),
    ("a: {" * 1000, "levels deep"), ("a: &a [*a]", "part of"),
    ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)), "levels deep"),
    ("9" * 10_000, "not valid YAML"), ("a" * 5_000_000, "bytes"), ("\0", "not valid YAML")], ids=range(10))
def test_a_config_that_means_harm_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    said = refused(text, tmp_path)
    assert said.startswith("--config: ") and words in said and len(said) < 600


def test_a_pipe_or_a_device_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a device")):
        with pytest.raises(Unreadable, match=kind):
            read_bytes(path)
        with pytest.raises(UserError, match=kind):
            parse_config(FAMILIES, ["--config", str(path)])
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


@pytest.mark.parametrize(("text", "value"), [('{"a": [1, null, "x"]}', {"a": [1, None, "x"]}), ('{"a": 1, "a": 1}', {"a": 1}),
                                             ("[" * 64 + "]" * 64, json.loads("[" * 64 + "]" * 64))])
def test_json_is_read_as_json_reads_it(text: str, value: object) -> None:
    assert parse_json(text) == value


@pytest.mark.parametrize(("text", "words"), [
    ('{"a": 1, "a": 2}', "'a' two values"), ("[" * 100_000, "levels deep"), ("[" * 65 + "]" * 65, "levels deep"),
    ('{"a":' * 900 + "1" + "}" * 900, "levels deep"), ("{", "not valid JSON"), ("", "not valid JSON"),
    ("1" * 10_000, "not valid JSON")], ids=range(7))
def test_json_that_means_harm_is_one_line(text: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        parse_json(text)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "key"), [
    ("gpt", "data.workers"), ("gpt", "data.sequence_length"), ("gpt", "train.global_batch_size"), ("gpt", "run.seed"),
    ("dcgan", "model.width"), ("dcgan", "model.latent"), ("dcgan", "data.size"), ("vae", "model.blocks"),
    ("vae", "model.multipliers"), ("points", "model.hidden_layers"), ("points", "data.validation_points")])
def test_sizes_that_no_machine_has_are_refused_at_once(family: str, key: str, tmp_path: Path) -> None:
    section, _, name = key.partition(".")
    settings = {"model": {"family": family}}
    settings.setdefault(section, {})[name] = [10**30] if name == "multipliers" else 2**63
    assert refused(json.dumps(settings), tmp_path).startswith(f"{key}: must be at most")


@pytest.mark.parametrize(("flags", "words"), [
    (["--model.layers", 100_000_000], ["model.layers", "100000000", "at most 2000"]),
    (["--model.width", 10**12], ["model.width", "at most"]),
    (["--model.positions", 2 * 10**9], ["model.positions", "at most"]),
    (["--model.width", 2**17, "--model.heads", 1, "--model.layers", 2000], ["model.mlp_width 524288", "at most 1e+14"]),
    (["--model.width", 2**16, "--model.heads", 1, "--model.layers", 1], ["parameters", "GiB", "at most"]),
    (["--train.global_batch_size", 2**30], ["train.micro_batch_size", "GiB", "at most"]),
    (["--data.prefetch_steps", 10**6, "--train.steps", 10**6, "--train.global_batch_size", 10**4], ["prefetch_steps", "GiB"])])
def test_what_would_not_fit_is_refused_before_it_is_made(flags, words, refuse) -> None:
    started = time.monotonic()
    said = refuse(*flags)
    assert all(word in said for word in words), said
    assert time.monotonic() - started < 10


def test_a_validation_set_that_does_not_fit_is_refused_before_it_is_read() -> None:
    with pytest.raises(UserError, match=r"^data.size: \d+ images of 16384 pixels to validate on are .* GiB"):
        ImageData(ImageDataSettings(source="digits", size=16384, channels=3, validation_images=10**6), 0)
