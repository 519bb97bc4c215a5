"""genscale data build and inspect, as a person runs them."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genscale.data.text import sources
from genscale.data.text.sources import HASHES, text_hash
from genscale.testing.runs import Run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 10 to 590 characters in two files, in a stream of which each is one."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(2):
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": f"doc {number} {i:03d} " * (1 + i % 59)}) + "\n" for i in range(300))
    return folder


def flags(corpus: Path, cache: Path | None, **changes: Any) -> list[str]:
    chosen = {"source": corpus, "lanes": 4, "sequence_length": 64, "validation_fraction": 0.1, **changes}
    chosen |= {"cache": cache} if cache else {}
    return [word for name, value in chosen.items() for word in (f"--data.{name}", str(value))]


@pytest.mark.parametrize("limit", [0, sources.MEMORY_LIMIT])
def test_build_fills_the_cache_and_says_what_is_in_it(genscale: Callable, corpus: Path, tmp_path: Path, limit: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", limit)
    done = genscale("data", "build", *flags(corpus, tmp_path / "cache"), "--processes", 1)
    assert done.code == 0, done.err
    texts = [json.loads(line)["text"] for file in corpus.iterdir() for line in file.read_text().splitlines()]
    training = [len(text.encode()) for text in texts]
    assert "complete: train with --data.cache" in done.out
    documents = int(done.out.split(" documents")[0].rsplit(" ", 1)[1].replace(",", ""))
    tokens = int(done.out.split(" documents, ")[1].split(" tokens")[0].replace(",", ""))
    assert 0.8 * len(texts) < documents < len(texts)
    assert 0.8 * sum(training) < tokens - documents < sum(training)  # bytes are tokens, and every document has an end
    assert f"{(tokens - documents) / tokens:.2f} bytes of text a token" in done.out
    again = genscale("data", "build", *flags(corpus, tmp_path / "cache"), "--processes", 1)
    assert again.code == 0 and "tokens/s" not in again.out and f"{tokens:,} tokens" in again.out


def test_build_stopped_goes_on_by_several_processes(genscale_start: Callable, genscale_finish: Callable, genscale: Callable,
                                                    tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    words = " ".join(f"word{i}" for i in range(3000))
    with (tmp_path / "text" / "a.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} {words}"}) + "\n" for i in range(300))
    tokenizer = tmp_path / "bpe"
    made = genscale("tokenizer", "train", *flags(tmp_path / "text", None), "--vocab_size", 300, "--out", tokenizer)
    assert made.code == 0, made.err
    command = ["data", "build", *flags(tmp_path / "text", tmp_path / "cache", tokenizer=tokenizer), "--processes", 2]
    process = genscale_start(*command)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").rglob("*.tokens")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stopped = genscale_finish(process)
    assert stopped.code == 130 and "run the same command to go on" in stopped.out, stopped
    assert "Traceback" not in stopped.err
    kept = int(stopped.out.split(" documents")[0].rsplit(" ", 1)[1].replace(",", ""))
    training = sum(text_hash(f"{i} {words}") >= 0.1 * HASHES for i in range(300))
    assert 0 < kept < training
    done = genscale("data", "build", *flags(tmp_path / "text", tmp_path / "cache", tokenizer=tokenizer), "--processes", 1)
    assert done.code == 0 and f" {training} documents" in done.out, done.out  # 300 less the tenth that is held out


def test_a_run_from_the_cache_is_the_run_without(genscale: Callable, tiny_config: Path, tiny_run: Path, tmp_path: Path) -> None:
    def run(name: str, *extra: object) -> list[Any]:
        done = genscale("train", "--config", tiny_config, "--run.name", name, *extra)
        assert done.code == 0, done.err
        records = Run(tiny_run.parent / name).metrics()
        return [(record["loss"], record.get("data_digest")) for record in records if "loss" in record]

    plain = run("plain")
    assert run("writing", "--data.cache", tmp_path / "cache") == plain
    assert run("reading", "--data.cache", tmp_path / "cache") == plain
    assert list((tmp_path / "cache").rglob("*.tokens"))


def test_inspect_shows_blocks_with_their_boundaries(genscale: Callable, corpus: Path) -> None:
    done = genscale("data", "inspect", *flags(corpus, None, sequence_length=700), "--blocks", 2)
    assert done.code == 0, done.err
    assert "block 0 (lane 0): 700 tokens" in done.out and "block 1 (lane 1): 700 tokens" in done.out
    assert "│ doc " in done.out and "end of document (" in done.out and "goes on in the next block (" in done.out
    lengths = done.out.split("shortest ")[1]
    shortest, longest = int(lengths.split(",")[0]), int(lengths.split("longest ")[1].split(" ")[0])
    assert shortest == len("doc 0 000 ") + 1 and longest == 59 * len("doc 0 000 ") + 1
    assert "1.00 bytes of text a token" in done.out


def test_inspect_of_a_mixture_names_the_sources(genscale: Callable, corpus: Path, tiny_text: Path) -> None:
    entries = [{"source": str(corpus), "weight": 3, "name": "numbers"}, {"source": str(tiny_text), "name": "topics"}]
    done = genscale("data", "inspect", "--data.sources", json.dumps(entries), "--data.lanes", 4, "--data.sequence_length", 64,
                    "--blocks", 32)
    assert done.code == 0, done.err
    assert "numbers 75.0 %, topics 25.0 %" in done.out
    assert ", numbers): 64 tokens" in done.out and ", topics): 64 tokens" in done.out


@pytest.mark.parametrize(("arguments", "words"), [
    (["build"], ["data.cache=None", "set the folder"]),
    (["bild"], ["'bild' is not one of: build, inspect", "did you mean 'build'"]),
    (["inspect", "--data.source", "nowhere.txt"], ["data.source=nowhere.txt"]),
    (["inspect", "--model.family", "vae", "--data.class_names", "[0, 1]"], ["class_names: must be a list of texts like ['0'"]),
    (["inspect", "--model.family", "vae", "--data.value_range", "[5]"], ["value_range: must be two numbers like [0, 255]"]),
    (["build", "--data.cash", "x"], ["unknown setting", "data.cache"]),
])
def test_mistakes_are_one_line(genscale: Callable, arguments: list[str], words: list[str]) -> None:
    message = genscale("data", *arguments).message()
    assert all(word in message for word in words), message
