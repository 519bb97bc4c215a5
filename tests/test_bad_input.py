"""Every mistake a user can make comes out as one line with the key, the value, the reason and what is allowed, before the
first step, with exit code 2."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from genscale.training.checkpoints import Checkpoint, write_checkpoint

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml")


@pytest.fixture
def refuse(genscale, tiny_config, tiny_run, logged_steps) -> Callable[..., str]:
    """Run the tiny config with other settings; check that it is refused before a step, and return the one line."""

    def run(*overrides: object, config: Path = tiny_config) -> str:
        before = logged_steps(tiny_run)
        message = genscale("train", "--config", config, *overrides).message()
        assert logged_steps(tiny_run) == before
        return message

    return run


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


# --- the config ----------------------------------------------------------------------------------------------------------


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
    (["--optimizer.betas", "[0.9]"], ["optimizer.betas", "2 elements", "[0.9]"]),
    (["--optimizer.betas", "[0.9, 1.5]"], ["optimizer.betas", "from 0 to 1", "1.5"]),
    (["--optimizer.betas", "0.9"], ["optimizer.betas", "[0.9, 0.95]", "0.9"]),
    (["--schedule.final_share", 2], ["schedule.final_share", "from 0 to 1", "2"]),
    (["--data.validation_fraction", 1], ["data.validation_fraction", "between 0 and 1", "1"]),
    (["--parallel.compile", "maybe"], ["parallel.compile", "true or false", "maybe"]),
    (["--train.precision", "fp8"], ["train.precision", "fp8", "fp32, bf16, fp16"]),
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
    (b"\xff\xfe\x00train", ["not valid YAML"]),
])  # fmt: skip
def test_a_file_that_is_no_config(text, words, refuse, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    holds(refuse(config=path), "--config", path, *words)


def test_a_missing_config_names_the_nearest(refuse, tiny_config):
    holds(refuse(config=tiny_config.with_name("tinny.yaml")), "--config", "tinny.yaml", "'tiny.yaml'")
    holds(refuse(config=tiny_config.parent), "--config", "directory")


# --- what does not fit together ------------------------------------------------------------------------------------------


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
    (["--parallel.strategy", "zero3", "--parallel.activation_checkpointing", "selective"],
     ["parallel.activation_checkpointing", "selective", "zero3", "full"]),
])  # fmt: skip
def test_settings_that_exclude_each_other(arguments, words, refuse):
    holds(refuse(*arguments), *words)


# --- the data ------------------------------------------------------------------------------------------------------------


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
    holds(refuse("--data.source", source, "--data.column", "id"), "data.column=id", "int64", "texts")


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


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "networks" / "gpt.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    file = checkpoint / "optimizers" / "gpt.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": (flip_a_byte, "networks/gpt.safetensors is damaged"),
    "a file cut short": (cut_short, "optimizers/gpt.safetensors has"),
    "a missing file": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"format": 1,'), "manifest.json is damaged"),
    "an empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "format None is not 1"),
    "another manifest": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a manifest of no files": (lambda c: (c / "manifest.json").write_text('{"format": 1}'), "manifest.json is damaged"),
}


@pytest.fixture
def copied(trained, tiny_config, tiny_run) -> Path:
    """The trained run in the place of `tiny_config`'s: a run to go on from."""
    shutil.copytree(trained, tiny_run)
    return tiny_run


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(case, genscale, copied, trained, tiny_config):
    damage, reason = DAMAGES[case]
    newest = copied / "checkpoints" / "step-00000006"
    damage(newest)
    done = genscale("train", "--config", tiny_config)
    assert done.code == 0, done.err
    warning = next(line for line in done.err.splitlines() if line.startswith("warning"))
    holds(warning, newest, reason, "the one before it")
    assert f"continuing from {copied / 'checkpoints' / 'step-00000004'}" in done.err
    assert Checkpoint(newest).problem() is None
    assert Checkpoint(newest).digest() == Checkpoint(trained / "checkpoints" / newest.name).digest()


def test_every_checkpoint_damaged(genscale, copied, tiny_config):
    for checkpoint in (copied / "checkpoints").iterdir():
        cut_short(checkpoint)
    done = genscale("train", "--config", tiny_config)
    assert done.code == 2
    lines = done.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning", "warning", "error"], done.err
    holds(lines[-1], "run.resume", copied, "every checkpoint", "--run.resume never")


def test_the_checkpoint_asked_for_is_damaged_or_not_there(refuse, copied):
    chosen = copied / "checkpoints" / "step-00000004"
    cut_short(chosen)
    holds(refuse("--run.resume", chosen), "run.resume", chosen, "optimizers/gpt.safetensors", "auto")
    holds(refuse("--run.resume", "alwyas"), "run.resume", "alwyas", "auto, never")
    holds(refuse("--run.resume", copied / "samples"), "run.resume", copied / "samples")


def test_the_checkpoint_of_another_model(refuse, trained):
    other = trained / "checkpoints" / "step-00000004"
    message = refuse("--run.resume", other, "--model.width", 64, "--model.layers", 1)
    holds(message, "run.resume", other, "model.layers (was 2, now 1)", "model.width (was 32, now 64)")


def test_a_checkpoint_whose_tensors_are_of_another_model(refuse, trained, tmp_path):
    # As written by a version of the model with other layers under the same config.
    right = trained / "checkpoints" / "step-00000004"
    name = names_of(right)[0]
    wrong = replaced(right, tmp_path, name, torch.zeros(7))
    holds(refuse("--run.resume", wrong.path), "run.resume", wrong.path, "another model", f"gpt.{name} is (7,)")


def names_of(checkpoint: Path) -> list[str]:
    return Checkpoint(checkpoint).tensors("networks", "gpt").keys()


def replaced(checkpoint: Path, folder: Path, name: str, value: torch.Tensor) -> Checkpoint:
    """A valid copy of a checkpoint in which one weight is another."""
    old = Checkpoint(checkpoint)
    tensors = {}
    for kind in ("networks", "optimizers"):
        read = old.tensors(kind, "gpt")
        tensors[f"{kind}/gpt"] = {key: read(key) for key in read.keys()}  # noqa: SIM118 - no mapping
    tensors["networks/gpt"][name] = value
    folder.mkdir(exist_ok=True)
    return write_checkpoint(folder, old.step, tensors, old.state(), (checkpoint / "config.yaml").read_text())


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model.layers", 3, "--optimizer.lr", 0.5], ["model.layers (was 2, now 3)", "optimizer.lr (was 0.001, now 0.5)"]),
    (["--run.seed", 1], ["run.seed (was 1337, now 1)"]),
    (["--train.global_batch_size", 8], ["train.global_batch_size (was 4, now 8)"]),
    (["--data.sequence_length", 16], ["data.sequence_length (was 32, now 16)"]),
])  # fmt: skip
def test_resume_with_another_config_names_the_keys(arguments, words, refuse, copied):
    holds(refuse(*arguments), "run.resume", *words, "--run.name", "--run.resume never")


def test_resume_with_other_data_of_the_same_name(refuse, copied, tiny_text):
    whole = tiny_text.read_text()
    try:
        tiny_text.write_text(whole + "\n\nAn afterthought.")
        holds(refuse(), "run.resume", "the data is not what the checkpoint", "source_content", "--run.name")
    finally:
        tiny_text.write_text(whole)


def test_what_may_change_at_resume_may(genscale, copied, trained, tiny_config, logged_steps):
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    done = genscale("train", "--config", tiny_config, "--train.log_every", 2, "--parallel.strategy", "ddp",
                    "--train.checkpoint_keep", 9, "--train.micro_batch_size", 4, "--data.prefetch_steps", 1)  # fmt: skip
    assert done.code == 0, done.err
    holds(done.err, "continuing from", "train.log_every: 1 -> 2", "parallel.strategy: 'auto' -> 'ddp'")
    last = Path("checkpoints") / "step-00000006"
    assert logged_steps(copied) == [1, 2, 3, 4, 6]
    assert Checkpoint(copied / last).digest() == Checkpoint(trained / last).digest()


# --- the run folder and the disk -----------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written(refuse, tmp_path, small_disk):
    (tmp_path / "file").write_text("")
    below_a_file = tmp_path / "file" / "runs"
    holds(refuse("--run.dir", below_a_file), "run.dir", below_a_file, "Not a directory", "--run.dir")
    read_only = small_disk("1m,ro")
    holds(refuse("--run.dir", read_only), "run.dir", read_only / "tiny", "Read-only file system", "--run.dir")


def test_a_disk_too_small_or_full_at_the_start(refuse, small_disk):
    small = small_disk("1m")
    holds(refuse("--run.dir", small), "run.dir", "disk full", small, "MiB free", "train.checkpoint_keep (3)", "--run.dir")
    full = small_disk("64k")
    fill(full)
    holds(refuse("--run.dir", full), "run.dir", full, "--run.dir")


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    return filler


@pytest.mark.parametrize("freed", [True, False])
def test_a_disk_that_fills_up_in_the_middle_of_a_run(freed, genscale, small_disk, tiny_config, logged_steps):
    """The periodic checkpoint that fails is a warning; the last one that fails is an error that names the last good one."""
    disk = small_disk("5m")
    run = disk / "tiny"
    first, second = (run / "checkpoints" / f"step-00000{step}" for step in (100, 200))

    def fill_up() -> None:
        wait_for(first.exists)
        filler = fill(disk)
        if freed:
            wait_for(lambda: "step-00000200 could not be written" in (run / "logs" / "rank-00000.log").read_text())
            filler.unlink()

    # The log must have room for the warning when the disk is full: its last page is not.
    thread = threading.Thread(target=fill_up, daemon=True)
    thread.start()
    arguments = ["--run.dir", disk, "--train.steps", 300, "--train.checkpoint_every", 100, "--train.log_every", 50]
    done = genscale("train", "--config", tiny_config, *arguments)
    thread.join(timeout=10)
    assert "Traceback" not in done.err, done.err
    warnings = [line for line in done.err.splitlines() if line.startswith("warning") and "checkpoint" in line]
    assert len(warnings) == 1, done.err
    holds(warnings[0], second, "could not be written", "No space left", "training goes on", first)
    assert not list((run / "checkpoints").glob(".partial*"))
    assert Checkpoint(first).problem() is None
    if freed:
        assert done.code == 0, done.err
        assert Checkpoint(run / "checkpoints" / "step-00000300").problem() is None
    else:
        assert done.code == 2
        last = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(last) == 1
        holds(last[0], "step-00000300", "could not be written", "last good checkpoint", first)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# --- a loss that is not a number -----------------------------------------------------------------------------------------


def test_a_learning_rate_that_blows_up(genscale, tiny_config, tiny_run, logged_steps):
    message = genscale("train", "--config", tiny_config, "--optimizer.lr", 1e38, "--train.checkpoint_every", 1).message_of_run()
    step = int(re.search(r"at step (\d+)", message).group(1))
    assert logged_steps(tiny_run) == list(range(1, step)) and step > 1
    holds(message, "loss", "nan", "rank 0", f"last good checkpoint: {tiny_run}/checkpoints/step-{step - 1:08d}", "optimizer.lr")


def test_a_weight_that_is_infinite(genscale, copied, tiny_config, tmp_path):
    chosen = copied / "checkpoints" / "step-00000004"
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    name = names_of(chosen)[0]
    weight = Checkpoint(chosen).tensors("networks", "gpt")(name).clone()
    weight.view(-1)[0] = float("inf")
    replaced(chosen, chosen.parent, name, weight)
    message = genscale("train", "--config", tiny_config).message_of_run()
    holds(message, "nan", "at step 5 on rank 0", "last good checkpoint", chosen)


# The loss of one sample of one step is not a number, as if its data were damaged: only one rank sees it.
PLANTED = """
import sys
from genscale.cli import main
from genscale.objectives.language_model import LanguageModel
loss = LanguageModel.loss
def planted(self, networks, batch, draws):
    terms = loss(self, networks, batch, draws)
    return {"loss": terms["loss"] * (float("nan") if 11 in batch["sample"].tolist() else 1.0)}
LanguageModel.loss = planted
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow),
                                      pytest.param("zero2", marks=pytest.mark.slow)])  # fmt: skip
def test_a_loss_that_is_no_number_on_one_rank_only(strategy, genscale_process, tiny_config, tiny_run, tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = genscale_process(script, "--config", tiny_config, "--parallel.strategy", strategy, command=ACCELERATE)
    # Sample 11 is the last of the third batch of 4, so the second of two ranks has it.
    message = one_error(done)
    holds(message, "loss", "nan", "at step 3 on rank 1", "last good checkpoint", tiny_run / "checkpoints" / "step-00000002")


# --- several processes ---------------------------------------------------------------------------------------------------


def one_error(done) -> str:
    """The one `error:` line of several processes, without a traceback of ours."""
    assert done.code != 0, done.err
    text = done.out + done.err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and text.count(lines[0]) == 1, text
    assert 'genscale/' not in "".join(line for line in text.splitlines() if line.lstrip().startswith("File ")), text
    return lines[0]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--parallel.strategy", "single"], ["parallel.strategy", "single", "one process", "ddp"]),
    (["--data.source", "nowhere.txt"], ["data.source=nowhere.txt", "no such file"]),
    (["--train.global_batch_size", 4096], ["train.global_batch_size=4096", "less than one global batch"]),
    pytest.param(["--model.heads", 3], ["model.heads", "3"], marks=pytest.mark.slow),
    pytest.param(["--run.resume", "nowhere"], ["run.resume", "nowhere"], marks=pytest.mark.slow),
])  # fmt: skip
def test_two_processes_say_it_once_and_end(arguments, words, genscale_process, tiny_config, tiny_run, logged_steps):
    done = genscale_process("train", "--processes", 2, "--config", tiny_config, *arguments, timeout=60)
    assert done.code == 2
    assert "Traceback" not in done.err
    holds(one_error(done), *words)
    assert logged_steps(tiny_run) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.stpes", 3], ["--train.stpes", "'train.steps'"]),
    pytest.param(["--data.column", "txet"], ["data.column=txet", "'text'"], marks=pytest.mark.slow),
    pytest.param(["--run.dir", "/dev/null/runs"], ["run.dir", "/dev/null/runs", "Not a directory"], marks=pytest.mark.slow),
])  # fmt: skip
def test_accelerate_launch_says_it_once_and_ends(arguments, words, genscale_process, tiny_config, tiny_run, logged_steps):
    done = genscale_process("train.py", "--config", tiny_config, *arguments, command=ACCELERATE, timeout=60)
    holds(one_error(done), *words)
    assert logged_steps(tiny_run) == []


@pytest.mark.slow
def test_two_processes_find_a_damaged_checkpoint(genscale_process, copied, tiny_config):
    newest = copied / "checkpoints" / "step-00000006"
    cut_short(newest)
    done = genscale_process("train", "--processes", 2, "--config", tiny_config)
    assert done.code == 0, done.err
    assert done.err.count("the one before it") == 1
    assert Checkpoint(newest).problem() is None
    for checkpoint in newest.parent.iterdir():
        cut_short(checkpoint)
    done = genscale_process("train", "--processes", 2, "--config", tiny_config, timeout=60)
    assert done.code == 2
    holds(one_error(done), "every checkpoint", "--run.resume never")


def test_a_closed_pipe_is_no_mistake():
    command = f"{sys.executable} -m genscale train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: genscale train") and done.stderr == ""
