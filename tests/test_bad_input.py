"""Every mistake a user can make comes out as one line with the key, the value, the reason and what is allowed, before the
first step, with exit code 2."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


def holds(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message, message


def edited(config: Path, **sections: object) -> Path:
    """A copy of a config with keys added to its sections, or sections replaced."""
    content = yaml.safe_load(config.read_text())
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    path = config.with_name("edited.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sections", "words"), [
    ({"train": {"stpes": 5}}, ["train.stpes", "unknown key", "edited.yaml", "'train.steps'"]),
    ({"trian": {"steps": 5}}, ["trian", "unknown key", "'train'"]),
    ({"steps": 5}, ["steps", "unknown key", "'train.steps'"]),
    ({"optimizer": {"betas": {"first": 0.9}}}, ["optimizer.betas"]),
    ({"train": 5}, ["train", "section", "5"]),
    ({"train": {"steps": "many"}}, ["train.steps", "whole number", "at least 1", "many"]),
    ({"train": {"steps": None}}, ["train.steps", "whole number", "None"]),
    ({"model": {"family": ["gpt"]}}, ["model.family", "gpt"]),
    ({"run": {"seed": -1}}, ["run.seed", "at least 0", "-1"]),
    ({1: {"steps": 5}}, ["1", "unknown key"]),
])  # fmt: skip
def test_a_wrong_key_or_value_in_the_file(sections, words, refuse, tiny_config):
    config = edited(tiny_config, **{k: v for k, v in sections.items() if isinstance(k, str)})
    if 1 in sections:
        config.write_text(config.read_text() + "1: {steps: 5}\n")
    holds(refuse(config=config), *words)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.stpes", 5], ["--train.stpes", "'train.steps'"]),
    (["--steps=5"], ["--steps", "'train.steps'"]),
    (["stray"], ["stray"]),
    (["--train.steps"], ["train.steps", "expected one argument"]),
    (["--train.steps", "many"], ["train.steps", "whole number", "many"]),
    (["--train.steps", 2.5], ["train.steps", "whole number", "2.5"]),
    (["--train.steps", 0], ["train.steps", "at least 1", "0"]),
    (["--train.log_every", -3], ["train.log_every", "at least 1", "-3"]),
    (["--optimizer.lr", 0], ["optimizer.lr", "above 0", "0"]),
    (["--optimizer.lr", "inf"], ["optimizer.lr", "inf"]),
    (["--optimizer.lr", "nan"], ["optimizer.lr", "nan"]),
    (["--optimizer.betas", "[0.9]"], ["optimizer.betas", "list of 2", "[0.9]"]),
    (["--optimizer.betas", "[0.9, 1.5]"], ["optimizer.betas", "from 0 to 1", "1.5"]),
    (["--optimizer.betas", "0.9"], ["optimizer.betas", "[0.9, 0.95]", "0.9"]),
    (["--schedule.final_share", 2], ["schedule.final_share", "from 0 to 1", "2"]),
    (["--data.validation_fraction", 1], ["data.validation_fraction", "between 0 and 1", "1"]),
    (["--parallel.compile", "maybe"], ["parallel.compile", "true or false", "maybe"]),
    (["--train.precision", "fp64"], ["train.precision", "fp64", "fp32, bf16, fp16"]),
    (["--parallel.strategy", "zero4"], ["parallel.strategy", "zero4", "zero3"]),
    (["--model.family", "gtp"], ["model.family", "gtp", "'gpt'"]),
    (["--run.name", "a/b"], ["run.name", "a/b", "run.dir"]),
    (["--processes", "two"], ["--processes", "whole number", "two"]),
    (["--processes", 0], ["--processes", "at least 1", "0"]),
])  # fmt: skip
def test_a_wrong_setting_on_the_command_line(arguments, words, refuse):
    holds(refuse(*arguments), *words)


@pytest.mark.parametrize(("text", "words"), [
    ("train: [", ["not valid YAML"]),
    ("- train", ["sections", "list"]),
    (b"\xff\xfe\x00train", ["UTF-16, not UTF-8"]),
    (b"\x93NUMPY", ["no text (byte 0)", "UTF-8"]),
    ("", ["is empty", "'train:'"]),
    ("# steps: 5\n", ["is empty", "'train:'"]),
    ("5", ["sections", "int"]),
    ("train: 1\n---\ntrain: 2", ["another document"]),
])  # fmt: skip
def test_a_file_that_is_no_config(text, words, refuse, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    holds(refuse(config=path), "--config", path, *words)


def test_a_missing_config_names_the_nearest(refuse, tiny_config):
    holds(refuse(config=tiny_config.with_name("tinny.yaml")), "--config", "tinny.yaml", "'tiny.yaml'")
    holds(refuse(config=tiny_config.parent), "--config", "directory")


# --- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model.heads", 3], ["model.heads", "3", "model.width 32", "2 or 4", "30 or 33"]),
    (["--data.sequence_length", 64], ["data.sequence_length", "64", "model.positions 32", "at most 32"]),
    (["--model.vocab_size", 64], ["model.vocab_size", "64", "257"]),
    (["--train.micro_batch_size", 3], ["train.micro_batch_size", "3", "train.global_batch_size 4", "2 or 4", "3 or 6"]),
    (["--train.global_batch_size", 5, "--processes", 2], ["train.global_batch_size", "5", "2 processes", "4 or 6"]),
    (["--train.micro_batch_size", 4, "--processes", 2], ["train.micro_batch_size", "4 x 2 processes", "4", "1 or 2"]),
    (["--train.precision", "fp16", "--parallel.strategy", "zero2"], ["train.precision", "fp16", "zero2", "bf16"]),
    (["--train.precision", "fp16", "--parallel.strategy", "fsdp2"], ["train.precision", "fp16", "fsdp2", "bf16"]),
    (["--parallel.offload", "cpu"], ["parallel.offload", "cpu", "needs ZeRO", "single", "zero1"]),
    (["--parallel.offload", "cpu", "--parallel.strategy", "fsdp2"], ["parallel.offload", "fsdp2", "zero1"]),
    (["--optimizer.lr_of", '{"generator": 1e-3}'], ["optimizer.lr_of", "generator", "networks are gpt"]),
    (["--parallel.strategy", "zero2", "--optimizer.name", "muon"], ["optimizer.name", "muon", "zero2", "fsdp2"]),
])  # fmt: skip
def test_settings_that_exclude_each_other(arguments, words, refuse):
    holds(refuse(*arguments), *words)


# --- the data ---------------------------------------------------------------------------------------------------------


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def folder_of(path: Path, name: str | None = None, content: bytes = b"") -> Path:
    path.mkdir()
    if name:
        (path / name).write_bytes(content)
    return path


SOURCES = {
    "a missing file": (lambda t: t / "nothing.txt", ["there is no such file", "nothing.txt"]),
    "a misspelt file": (lambda t: jsonl(t / "letters.jsonl", {"text": "a"}).with_name("leters.jsonl"), ["'letters.jsonl'"]),
    "a missing folder": (lambda t: t / "no" / "folder", ["there is no such file or folder"]),
    "an empty folder": (lambda t: folder_of(t / "empty"), ["holds no file that is read", ".jsonl"]),
    "a folder of other files": (lambda t: folder_of(t / "other", "a.csv", b"text\nhello\n"), ["holds no file", ".parquet"]),
    "a file of another kind": (lambda t: folder_of(t / "other", "a.csv", b"text\nhello\n") / "a.csv", ["not read", ".txt"]),
    "an empty file": (lambda t: folder_of(t / "none", "a.txt"), ["holds no text"]),
    "a blank file": (lambda t: folder_of(t / "blank", "a.txt", b"\n\n  \n"), ["holds no text"]),
    "rows without text": (lambda t: jsonl(t / "rows.jsonl", {"text": ""}, {"text": None}), ["holds no text"]),
    "a damaged archive": (lambda t: folder_of(t / "damaged", "a.txt.gz", gzip.compress(b"text " * 999)[:20]), ["damaged"]),
    "a damaged parquet": (lambda t: folder_of(t / "damaged", "a.parquet", b"PAR1 and no more"), ["damaged"]),
    "a damaged jsonl": (lambda t: folder_of(t / "damaged", "a.jsonl", b'{"text": "a"}\n{"text": '), ["damaged"]),
}  # fmt: skip


@pytest.mark.parametrize("key", ["data.source", "data.validation_source"])
@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_is_not_there_or_holds_nothing(case, key, refuse, tmp_path):
    make, words = SOURCES[case]
    source = make(tmp_path)
    holds(refuse(f"--{key}", source), f"{key}={source}", *words)


def test_a_column_that_is_not_there_or_holds_no_text(refuse, tmp_path):
    rows = [{"texts": "words and words", "id": number} for number in range(300)]
    source = jsonl(tmp_path / "rows.jsonl", *rows)
    holds(refuse("--data.source", source), "data.column=text", str(source), "id", "'texts'")
    message = refuse("--data.source", source, "--data.column", "id")
    holds(message, "data.column=id", "row 0 of rows.jsonl holds 0, not text", "texts")


def test_a_dataset_smaller_than_one_global_batch(refuse, tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("\n\n".join(f"paragraph {number} of few" for number in range(40)))
    message = refuse("--data.source", source, "--train.global_batch_size", 4096)
    holds(message, "train.global_batch_size=4096", source, "data.sequence_length=32", "less than one global batch")
    # What it advises works.
    blocks = int(re.search(r"train.global_batch_size to (\d+) at most", message).group(1))
    assert "less than one global batch" in refuse("--data.source", source, "--train.global_batch_size", blocks + 1)
    message = refuse("--data.source", source, "--train.global_batch_size", blocks, "--model.heads", 3)
    assert message.startswith("model.heads")  # the next mistake: the batch is no longer one


def test_a_dataset_of_one_document(refuse, tmp_path):
    source = tmp_path / "one.txt"
    source.write_text("a single paragraph " * 100)
    holds(refuse("--data.source", source), source, "training and a validation set", "data.validation_source")


@pytest.mark.parametrize(("content", "words"), [
    (None, ["there is no file"]),
    (b"{", ["not a tokenizer.json", "damaged", "genscale tokenizer train"]),
    (b'{"version": "1.0"}', ["not a tokenizer.json"]),
    (b"\xff\xfe", ["cannot be read"]),
    ("no end", ["no end-of-text token", "<|endoftext|>"]),
    ("cut", ["not a tokenizer.json", "damaged"]),
])  # fmt: skip
def test_a_damaged_tokenizer(content, words, refuse, tmp_path):
    path = tmp_path / "tokenizer.json"
    if isinstance(content, str):
        whole = _tokenizer_without_end()
        content = (whole[: len(whole) // 2] if content == "cut" else whole).encode()
    if content is not None:
        path.write_bytes(content)
    holds(refuse("--data.tokenizer", path), f"data.tokenizer={path}", *words)


def _tokenizer_without_end() -> str:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str()


def test_a_closed_pipe_is_no_mistake():
    command = f"{sys.executable} -m genscale train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: genscale train") and done.stderr == ""
