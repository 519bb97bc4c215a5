"""`genscale evaluate`: on the whole of another text, and what it says of tasks that cannot be run. (Tasks that can:
tests/evaluation/test_harness.py.)"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.families import FAMILIES, family
from genscale.settings.parser import load_config
from genscale.verbs.trained import load_weights

LAST = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of more blocks than a run's validation set is limited to, and no whole number of them."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: the square of {i} is {i * i}, as everyone knows." for i in range(60)))
    return path


def report(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@torch.no_grad()
def test_on_takes_in_the_whole_of_a_text(genscale, trained, book):
    result = report(genscale("evaluate", trained, "--on", book))
    paragraphs = book.read_text().split("\n\n")
    tokens = torch.tensor([token for words in paragraphs for token in [*words.encode(), 256]])
    checkpoint = Checkpoint(trained / LAST)
    objective = family("gpt").restore(load_config(FAMILIES, checkpoint.path / "config.yaml"), trained)
    load_weights(objective, checkpoint)
    nats = 0.0
    for start in range(0, len(tokens) - 1, 32):
        piece = tokens[start : start + 33]
        nats += F.cross_entropy(objective.networks["gpt"](piece[None, :-1])[0], piece[1:], reduction="sum").item()
    assert result["samples"] == math.ceil((len(tokens) - 1) / 32) > 64
    assert result["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    letters = sum(len(words) for words in paragraphs) - 1  # the very first is not predicted
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / letters, rel=1e-5)
    assert set(result) == set(report(genscale("evaluate", trained)))  # one shape of report
    assert report(genscale("evaluate", trained, f"--on={book}", "--data.validation_blocks", 5))["samples"] == 5


def test_on_another_text_the_training_text_is_not_needed(genscale, copied, tiny_text, book, tmp_path):
    """A model that was moved to another machine is evaluated there."""
    config = copied / LAST / "config.yaml"
    before = report(genscale("evaluate", copied, "--on", book))
    assert str(tiny_text) in config.read_text()
    after = report(genscale("evaluate", copied, "--on", book, "--data.source", tmp_path / "gone.txt"))
    assert after == before


def test_a_hugging_face_folder_stands_for_the_run_it_was_written_from(genscale, trained, book, tmp_path):
    folder = tmp_path / "published"
    assert genscale("export", trained, "--out", folder).code == 0
    before, after = (report(genscale("evaluate", run, "--on", book, "--train.precision", "fp32")) for run in (trained, folder))
    assert {key: after[key] for key in ("step", "samples")} == {"step": None, "samples": before["samples"]}
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    texts = {genscale("sample", run, "--prompt", "The ", "--tokens", 30, "--seed", 1).out for run in (trained, folder)}
    assert len(texts) == 1
    assert "--step" in genscale("evaluate", folder, "--step", 6).message()
    assert report(genscale("evaluate", folder, "--on", book, "--data.sequence_length", 16))["samples"] > before["samples"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--on", "nowhere.txt"], ["validation_source=nowhere.txt", "no such file"]),
    (["--on"], ["--on: needs a value"]),
    (["--on", "--step", 2], ["--on: needs a value"]),
    (["--on", "x.txt", "--tasks", "a"], ["--on", "x.txt", "--tasks", "leave one out"]),
    (["--limit", 3], ["--limit", "--tasks"]),
    (["--tasks", "a", "--limit", 0], ["--limit", "at least 1"]),
    (["--tasks", "a", "--include_path", "nowhere"], ["--include_path", "nowhere", "no folder"]),
])  # fmt: skip
def test_evaluate_refuses(arguments, words, genscale, trained):
    message = genscale("evaluate", trained, *arguments).message()
    assert all(word in message for word in words), message


def test_tasks_without_the_harness_say_what_to_install(genscale_process, trained):
    # None is what an import finds where a package is not installed.
    code = "import sys; sys.modules['lm_eval'] = None; from genscale.cli import main; sys.exit(main(sys.argv[1:]))"
    done = genscale_process("evaluate", trained, "--tasks", "hellaswag", command=(sys.executable, "-c", code))
    assert "pip install 'genscale[eval]'" in done.message()
