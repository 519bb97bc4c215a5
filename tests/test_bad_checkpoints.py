"""Damaged checkpoints, those of other runs and models, and what may change at resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.writing import write_checkpoint


def holds(message: str, *words: object) -> None:
    for word in words:
        assert str(word) in message, message



def flip_a_byte(checkpoint: Path) -> None:
    file = checkpoint / "networks" / "gpt.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    file = min((checkpoint / "optimizers").iterdir())
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": (flip_a_byte, "networks/gpt.safetensors is damaged"),
    "a file cut short": (cut_short, "optimizers/gpt.safetensors has"),
    "a missing file": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"format": 1,'), "manifest.json is damaged"),
    "an empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "format None is not 1 or 2"),
    "another manifest": (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "a manifest of no files": (lambda c: (c / "manifest.json").write_text('{"format": 1}'), "manifest.json is damaged"),
}


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


def test_a_weight_that_is_infinite(genscale, copied, tiny_config, tmp_path):
    chosen = copied / "checkpoints" / "step-00000004"
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    name = names_of(chosen)[0]
    weight = Checkpoint(chosen).tensors("networks", "gpt")(name).clone()
    weight.view(-1)[0] = float("inf")
    replaced(chosen, chosen.parent, name, weight)
    message = genscale("train", "--config", tiny_config).message_of_run()
    holds(message, chosen, "a weight that is infinite", "the one before it")


@pytest.mark.slow
@pytest.mark.matrix  # in CI: fault 5 of tests/faults/test_cases.py
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
    holds(done.one_error(), "every checkpoint", "--run.resume never")
