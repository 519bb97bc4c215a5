"""Each verb of the command line, as a user types it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.data.text.tokenizers import ByteTokenizer, load_tokenizer
from genscale.families import FAMILIES, family
from genscale.families.gpt.network import GPT
from genscale.settings.parser import load_config
from genscale.testing.runs import Run
from genscale.training.run import RunResult
from genscale.verbs.train import farewell

LAST = Path("checkpoints") / "step-00000006"


def done(outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out


# --- train ---------------------------------------------------------------------------------------------------------------


def test_print_config_is_a_config_of_the_same_run(genscale, trained, tiny_config, tiny_run, tmp_path):
    text = done(genscale("train", "--config", tiny_config, "--train.log_every", 2, "--print_config"))
    assert not tiny_run.exists()
    printed = tmp_path / "printed.yaml"
    printed.write_text(text)
    assert yaml.safe_load(text)["train"]["log_every"] == 2
    done(genscale("train", "--config", printed))
    assert Checkpoint(tiny_run / LAST).digest() == Checkpoint(trained / LAST).digest()


def test_the_config_in_the_run_folder_gives_the_same_run(genscale, trained, tmp_path):
    done(genscale("train", "--config", trained / "config.yaml", "--run.dir", tmp_path))
    assert Checkpoint(tmp_path / "tiny" / LAST).digest() == Checkpoint(trained / LAST).digest()


def test_the_run_folder_holds_what_it_should(trained):
    parts = {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "plots", "logs"}
    assert {path.name for path in trained.iterdir()} >= parts
    records = Run(trained).metrics()
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "data_wait_seconds"}
    assert all(keys <= record.keys() for record in training)
    assert training[-1]["tokens"] == 6 * 4 * 32
    assert (trained / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "logs" / "rank-00000.log").exists()
    assert [path.name for path in sorted((trained / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in (2, 4, 6)]


def test_what_is_printed_at_the_end(genscale, tiny_config, tiny_run):
    text = done(genscale("train", "--config", tiny_config, "--train.steps", 2))
    assert re.search(r"^validation: loss [\d.]+, .*bits per byte [\d.]+", text, re.MULTILINE)
    assert f"run folder: {tiny_run}" in text and f"loss curve: {tiny_run}/plots/loss.png" in text
    # Two of the commands it proposes are typed.
    words = re.search(r"^  sample +genscale (.*)$", text, re.MULTILINE).group(1)
    assert done(genscale(*words.replace("'", "").split())).startswith("The")
    words = re.search(r"^  train on +genscale (.*)$", text, re.MULTILINE).group(1)
    assert words.endswith("--train.steps 4") and words.count("--train.steps") == 1
    done(genscale(*words.split()))
    assert (tiny_run / "checkpoints" / "step-00000004").is_dir()


def test_a_finished_run_started_again_does_nothing(genscale, trained, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(trained, run)
    before = (run / "metrics.jsonl").read_bytes()
    outcome = genscale("train", "--config", run / "config.yaml", "--run.dir", tmp_path)
    assert "nothing to do" in outcome.err
    own = [json.loads(line) for line in before.decode().splitlines()][-1]["validation_loss"]
    assert f"validation: loss {own:.4f}" in done(outcome)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert Checkpoint(run / LAST).digest() == Checkpoint(trained / LAST).digest()


def test_resume_never_keeps_the_earlier_run(genscale, trained, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(trained, run)
    arguments = ["--run.dir", tmp_path, "--run.resume", "never", "--run.seed", 5]
    outcome = genscale("train", "--config", run / "config.yaml", *arguments)
    done(outcome)
    kept = next(run.glob("previous-*"))
    assert str(kept) in outcome.err
    assert Checkpoint(kept / LAST).digest() == Checkpoint(trained / LAST).digest() != Checkpoint(run / LAST).digest()


# --- sample --------------------------------------------------------------------------------------------------------------


def test_sample_follows_the_seed_and_the_checkpoint(genscale, trained):
    def sample(*arguments: object) -> str:
        return done(genscale("sample", trained, "--prompt", "The ", "--tokens", 40, *arguments))

    first = sample("--seed", 1)
    assert first.startswith("The ") and len(first) > 10
    assert sample("--seed", 1) == first != sample("--seed", 2)
    assert sample("--seed", 1, "--step", 6) == first
    texts = {sample("--seed", 1, "--step", step, "--tokens", 400) for step in (2, 4, 6)}
    assert len(texts) > 1, "four steps move little, and this text is another in another Python"
    two = sample("--seed", 1, "--count", 2)
    assert first.strip() in two and len(two) > 1.5 * len(first)
    chosen = done(genscale("sample", trained / LAST, "--prompt", "The ", "--tokens", 40, "--seed", 1))
    assert chosen == first


def test_sample_at_temperature_zero_takes_the_likeliest(genscale, trained):
    text = done(genscale("sample", trained, "--prompt", "word", "--tokens", 12, "--temperature", 0))
    network = network_of(trained / LAST)
    ids = list(b"word")
    for _ in range(12):
        ids.append(int(network(torch.tensor([ids]))[0, -1, :257].argmax()))
    assert text == ByteTokenizer().decode(ids[: ids.index(256) if 256 in ids else None]) + "\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--tokens", "x"], ["tokens", "whole number", "x"]),
    (["--tkens", 5], ["--tkens", "'tokens'"]),
    (["--step", 5], ["--step", "step 5", "2, 4, 6"]),
    (["--step", "x"], ["--step", "whole number", "x"]),
])  # fmt: skip
def test_sample_refuses(arguments, words, genscale, trained):
    message = genscale("sample", trained, *arguments).message()
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("temperature", -1), ("top_k", 0), ("top_p", 1.5), ("count", 0)])
def test_sample_refuses_what_no_text_can_be_drawn_with(name, value, genscale, trained):
    message = genscale("sample", trained, f"--{name}", value).message_of_run()
    assert name in message and str(value) in message


def network_of(checkpoint: Path) -> GPT:
    config = load_config(FAMILIES, checkpoint / "config.yaml")
    network = GPT(config.model, 320)  # 257 in whole tiles of 64
    read = Checkpoint(checkpoint).tensors("networks", "gpt")
    stored = {key: read(key) for key in read.keys()}  # noqa: SIM118 - no mapping
    missing = network.load_state_dict(stored, strict=False).missing_keys
    # A tied tensor is stored once.
    assert all(network.state_dict()[key].data_ptr() in {p.data_ptr() for p in network.parameters()} for key in missing)
    return network.eval()


# --- evaluate ------------------------------------------------------------------------------------------------------------


def test_evaluate_is_the_runs_own_validation(genscale, trained):
    own = Run(trained).metrics()[-1]
    report = json.loads(done(genscale("evaluate", trained, "--train.micro_batch_size", 4)))
    assert report["step"] == 6 and report["samples"] == 8
    assert {f"validation_{name}": report[name] for name in ("loss", "perplexity", "bits_per_byte")} == {
        name: own[name] for name in ("validation_loss", "validation_perplexity", "validation_bits_per_byte")
    }
    assert json.loads(done(genscale("evaluate", trained)))["loss"] == pytest.approx(own["validation_loss"], rel=1e-6)
    assert json.loads(done(genscale("evaluate", trained, "--step", 2)))["loss"] > own["validation_loss"]


@torch.no_grad()
def test_evaluate_on_other_data(genscale, trained, tmp_path):
    text = "Something else entirely, of a length that fills no whole number of blocks. " * 2
    other = tmp_path / "other.txt"
    other.write_text(text)
    report = json.loads(done(genscale("evaluate", trained, "--data.validation_source", other)))
    tokens = torch.tensor([*text.rstrip("\n").encode(), 256])
    nats, network = 0.0, network_of(trained / LAST)
    for start in range(0, len(tokens) - 1, 32):
        piece = tokens[start : start + 33]
        nats += F.cross_entropy(network(piece[None, :-1])[0], piece[1:], reduction="sum").item()
    assert report["loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--data.validation_source", "nowhere.txt"], ["data.validation_source=nowhere.txt", "no such file"]),
    (["--data.sequence_length", 64], ["data.sequence_length", "64", "model.positions 32"]),
    (["--model.layers", 1], ["model.layers: 1 is not that of", ", 2; leave it out"]),
    (["--data.validatoin_source", "x"], ["'data.validation_source'"]),
])  # fmt: skip
def test_evaluate_refuses(arguments, words, genscale, trained):
    message = genscale("evaluate", trained, *arguments).message()
    assert all(word in message for word in words), message


# --- tokenizer -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_and_trained_with(genscale, tiny_config, tiny_run, tiny_text, tmp_path):
    path = tmp_path / "bpe" / "tokenizer.json"
    text = done(genscale("tokenizer", "train", "--data.source", tiny_text, "--vocab_size", 300, "--out", path))
    assert "300 tokens" in text and f"--data.tokenizer {path}" in text
    tokenizer = load_tokenizer(str(path))
    words = "The statement is executed."
    assert tokenizer.decode(tokenizer.encode(words)) == words and len(tokenizer.encode(words)) < len(words)
    done(genscale("train", "--config", tiny_config, "--data.tokenizer", path))
    # The run is whole in its folder: the tokenizer file itself is no longer needed.
    path.unlink()
    assert done(genscale("sample", tiny_run, "--prompt", words, "--tokens", 5)).startswith(words)
    own = Run(tiny_run).metrics()[-1]
    report = json.loads(done(genscale("evaluate", tiny_run)))
    assert report["loss"] == pytest.approx(own["validation_loss"], rel=1e-6)


@pytest.mark.parametrize(("arguments", "words"), [
    (["tarin"], ["'tarin'", "'train'"]),
    (["train", "--vocab_size", 100], ["vocab_size=100", "257"]),
    (["train", "--vocab_szie", 300], ["--vocab_szie", "'vocab_size'"]),
    (["train", "--data.source", "nowhere.txt"], ["data.source=nowhere.txt"]),
    (["train", "--out", "/dev/null/tokenizer.json"], ["out", "/dev/null/tokenizer.json"]),
])  # fmt: skip
def test_tokenizer_refuses(arguments, words, genscale):
    message = genscale("tokenizer", *arguments).message()
    assert all(word in message for word in words), message


# --- checkpoint ----------------------------------------------------------------------------------------------------------


def test_checkpoint_lists_verifies_and_digests(genscale, trained, tmp_path):
    run = tmp_path / "tiny"
    shutil.copytree(trained, run)
    for verb in ("list", "verify"):
        _, *lines = done(genscale("checkpoint", verb, run)).splitlines()
        assert [re.search(r"step-(\d{8})", line).group(1) for line in lines] == ["00000002", "00000004", "00000006"]
        assert all("valid" in line for line in lines)
    of_the_run = done(genscale("checkpoint", "digest", run))
    assert re.fullmatch(r"[0-9a-f]{64}\n", of_the_run)
    assert of_the_run == done(genscale("checkpoint", "digest", run / LAST))
    assert of_the_run != done(genscale("checkpoint", "digest", run / LAST.with_name("step-00000004")))

    (run / LAST / "networks" / "gpt.safetensors").write_bytes(b"")
    _, *listed = done(genscale("checkpoint", "list", run)).splitlines()
    assert ["DAMAGED" in line for line in listed] == [False, False, True]
    verified = genscale("checkpoint", "verify", run)
    assert verified.code == 2 and "step-00000006" in verified.message_of_run()
    assert "step-00000004" not in verified.message_of_run()
    assert "networks/gpt.safetensors" in genscale("checkpoint", "digest", run).message()
    # What reads a run uses the checkpoint before it, and says so.
    report = genscale("evaluate", run)
    assert json.loads(done(report))["step"] == 4
    assert "step-00000006" in report.err and "the one before it" in report.err
    assert "networks/gpt.safetensors" in genscale("sample", run, "--step", 6).message()


@pytest.mark.parametrize("words", ["checkpoint list", "checkpoint verify", "checkpoint digest", "sample", "evaluate"])
def test_a_path_without_a_checkpoint(words, genscale, tmp_path):
    for path in (tmp_path / "absent", tmp_path, tmp_path / "step-00000001"):
        message = genscale(*words.split(), path).message()
        assert str(path) in message and "no checkpoint" in message


@pytest.mark.parametrize("arguments", [[], ["lst", "x"], ["list"], ["list", "a", "b"], ["--frobnicate"]])
def test_checkpoint_refuses(arguments, genscale):
    assert genscale("checkpoint", *arguments).message()


def test_what_to_type_next_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    metrics = {"loss": 1.5, "active_units": 16, "modes": 8, "fd": 1e-5}
    folder = tmp_path / "a $b; c"
    result = RunResult(folder, 10, metrics, tmp_path / "x.png", None, True)
    lines = farewell(result, ["--run.name", "a $b; c"], family("vae").sampling).splitlines()
    assert "validation: loss 1.5000, active units 16, modes 8, fd 1e-05" in lines
    commands = {line[2:19].strip(): shlex.split(line[19:]) for line in lines[lines.index("next:") + 1 :]}
    assert commands["sample"] == ["genscale", "sample", str(folder), "--count", "64", "--out", "grid.png"]
    assert commands["two processes"][5:8] == [f"{folder}/config.yaml", "--run.name", "a $b; c-2"]
    assert f"{folder}/config.yaml" in commands["see it in W&B"]
    monkeypatch.setenv("RANK", "0")
    without = farewell(RunResult(folder, 10, metrics, "text", None, True), [], None)
    assert "two processes" not in without and "genscale sample" not in without
