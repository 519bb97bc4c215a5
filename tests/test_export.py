"""`genscale export`: a trained run as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_in_transformers(trained: Path, tmp_path: Path, genscale) -> None:
    done = genscale("export", trained, "--out", tmp_path / "out", "--step", 4)
    assert done.code == 0, done.err
    assert "step 4" in done.out and re.search(r"same token ids; logits differ by at most \d", done.out), done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]

    theirs, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    stored = load_file(trained / "checkpoints" / "step-00000004" / "networks" / "gpt.safetensors")
    assert torch.equal(theirs.transformer.h[1].mlp.c_fc.weight, stored["layers.1.mlp.up.weight"].T)
    assert theirs.config.vocab_size == 320 and tokenizer.encode("é") == [0xC3, 0xA9]
    # Greedy text of theirs is greedy text of ours.
    prompt = tokenizer("The ", return_tensors="pt")
    text = tokenizer.decode(theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    ours = genscale("sample", trained, "--step", 4, "--prompt", "The ", "--tokens", 20,
                    "--temperature", 0)
    assert ours.code == 0 and text in ours.out


def test_an_export_can_be_started_from(trained: Path, tiny_config: Path, tiny_run: Path, tmp_path: Path, genscale) -> None:
    assert genscale("export", trained, "--out", tmp_path / "out", "--dtype", "bf16").code == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"].dtype == torch.bfloat16
    score = json.loads(genscale("evaluate", trained).out)["loss"]
    tiny_config.write_text(re.sub(r"model:\n(  .*\n)+", f"model:\n  from: {tmp_path / 'out'}\n", tiny_config.read_text()))
    done = genscale("train", "--config", tiny_config, "--train.steps", 1, "--optimizer.lr", 1e-9)
    assert done.code == 0, done.err
    # One idle step on the rounded weights: the loss of the run that was exported, to what bf16 takes away.
    assert json.loads(genscale("evaluate", tiny_run).out)["loss"] == pytest.approx(score, rel=1e-3)


def test_without_transformers_it_says_that_nothing_was_checked(trained: Path, tmp_path: Path, python_process) -> None:
    hidden = "import sys; sys.modules['transformers'] = None; from genscale.cli import main; sys.exit(main(sys.argv[1:]))"
    said = python_process(hidden, "export", trained, "--out", tmp_path / "out")
    assert "not checked: transformers is not installed" in said
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_refused(trained: Path, tmp_path: Path, genscale) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").write_text("mine")
    for arguments, words in [
        ([], ["RUN is missing"]),
        ([trained], ["--out", "missing"]),
        ([trained, "--out", taken], ["--out", "taken", "not empty"]),
        ([trained, "--out", taken / "x"], ["--out", "is a file"]),
        ([trained, "--out", "/proc/nothing/out"], ["--out", "cannot write"]),
        ([trained, "--out", tmp_path / "new", "--dtype", "fp16"], ["dtype", "fp16", "fp32, bf16"]),
        ([trained, "--out", tmp_path / "new", "--step", 3], ["--step", "no checkpoint of step 3"]),
        ([trained, "--ouf", tmp_path / "new"], ["--ouf", "'out'"]),
        ([tmp_path, "--out", tmp_path / "new"], ["no checkpoint here"]),
    ]:
        message = genscale("export", *arguments).message()
        for word in words:
            assert word in message, message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"] and (taken / "x").read_text() == "mine"


def test_an_empty_folder_may_be_given(trained: Path, tmp_path: Path, genscale) -> None:
    assert genscale("export", trained, "--out", tmp_path).code == 0
    assert (tmp_path / "config.json").is_file()


def test_a_model_without_a_class(tiny_config: Path, tiny_run: Path, tmp_path: Path, genscale) -> None:
    done = genscale("train", "--config", tiny_config, "--train.steps", 1, "--model.activation", "relu2")
    assert done.code == 0, done.err
    message = genscale("export", tiny_run, "--out", tmp_path / "out").message()
    assert "no Hugging Face class" in message and "model.activation relu2 (but gelu)" in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint(trained: Path, tmp_path: Path, genscale) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for file in copy.rglob("gpt.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert "damaged" in genscale("export", copy, "--out", tmp_path / "out").message()
