"""`model.from`: a run starts from a Hugging Face model, and needs it no more once it has begun."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.tokenizers import load_tokenizer, train_bpe
from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.interop.starting import complete_from, weights_from
from genscale.settings.config import Config
from genscale.testing.runs import Run


@pytest.fixture
def folder(model_named, saved) -> Path:
    """A Llama with rotary scaling, grouped queries and tied embeddings."""
    return saved(model_named("llama3-tied"))


@pytest.fixture
def config_from(tiny_config: Path) -> Callable[..., Path]:
    """`config_from(folder)`: the tiny run's config, whose model section says `from` and nothing else."""

    def write(name: object, **model: object) -> Path:
        content = yaml.safe_load(tiny_config.read_text())
        content["model"] = {"from": str(name), **model}
        tiny_config.write_text(yaml.safe_dump(content))
        return tiny_config

    return write


def first_batch(config: Path, tokenizer: Path) -> Tensor:
    """Tokens `(4, 33)` of the tiny run's first step."""
    content = yaml.safe_load(config.read_text())["data"] | {"tokenizer": str(tokenizer)}
    data = TextData(TextDataSettings(**content), seed=1337)
    return torch.stack([torch.as_tensor(next(data.open_lane(lane))[0]["tokens"]) for lane in range(4)]).long()


def test_the_first_step_has_the_models_loss(folder: Path, config_from, tiny_run: Path, genscale) -> None:
    config = config_from(folder)
    done = genscale("train", "--config", config, "--train.steps", 1)
    assert done.code == 0, done.err
    assert f"starting from the weights of {folder}" in done.out + done.err
    tokens = first_batch(config, folder)
    logits = AutoModelForCausalLM.from_pretrained(folder)(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert Run(tiny_run).losses()[0] == pytest.approx(expected, rel=1e-5)


def test_a_run_that_has_begun_needs_the_folder_no_more(folder: Path, config_from, tiny_run: Path, genscale) -> None:
    whole = tiny_run.with_name("whole")
    config = config_from(folder)
    assert genscale("train", "--config", config, "--run.name", "whole").code == 0
    assert genscale("train", "--config", config, "--train.steps", 4, "--schedule.name", "constant").code == 0
    shutil.rmtree(folder)
    # The command that began it, and the config it wrote, both go on without the folder.
    resumed = genscale("train", "--config", config, "--train.steps", 5, "--schedule.name", "constant")
    assert resumed.code == 0 and "continuing from" in resumed.out + resumed.err, resumed.err
    again = genscale("train", "--config", whole / "config.yaml", "--train.steps", 7)
    assert again.code == 0 and "continuing from" in again.out + again.err, again.err
    assert genscale("sample", tiny_run, "--tokens", 4).code == 0
    score = genscale("evaluate", tiny_run)
    assert score.code == 0 and json.loads(score.out)["step"] == 5
    shape = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert shape["model"]["from"] == shape["data"]["tokenizer"] == str(folder)
    assert (shape["model"]["preset"], shape["model"]["kv_heads"], shape["model"]["rope_scaling"]) == ("llama", 2, "llama3")
    # Only a new beginning needs it.
    assert "model.from: there is no folder" in genscale("train", "--config", config, "--run.name", "other").message_of_run()


def test_resuming_gives_the_run_that_was_never_stopped(folder: Path, config_from, tiny_run: Path, genscale) -> None:
    config = config_from(folder)
    constant = ("--schedule.name", "constant")
    assert genscale("train", "--config", config, "--run.name", "whole", *constant).code == 0
    assert genscale("train", "--config", config, "--train.steps", 3, *constant).code == 0
    shutil.rmtree(folder)
    assert genscale("train", "--config", config, *constant).code == 0
    one, other = (load_file(run / "checkpoints" / "step-00000006" / "networks" / "gpt.safetensors")
                  for run in (tiny_run, tiny_run.with_name("whole")))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_every_rank_starts_from_it(folder: Path, config_from, tiny_run: Path, genscale, genscale_group) -> None:
    config = config_from(folder)
    assert genscale("train", "--config", config, "--run.name", "alone").code == 0
    done = genscale_group("train", "--config", config, "--parallel.strategy", "fsdp2", timeout=240)
    assert done.code == 0, done.err
    assert Run(tiny_run).losses() == pytest.approx(Run(tiny_run.with_name("alone")).losses(), rel=1e-5)


# --- the settings -----------------------------------------------------------------------------------------------------


def config_of(name: object, tokenizer: str = "bytes", **model: object) -> Config:
    return Config(model=GPTSettings(from_=str(name), **model), data=TextDataSettings(tokenizer=tokenizer))


def test_the_shape_and_the_tokenizer_are_the_models(folder: Path) -> None:
    config = config_of(folder, dropout=0.1, loss_chunk=7, init_std=0.5)
    config, data = complete_from(config)
    model = config.model
    assert (model.layers, model.width, model.kv_heads, model.positions, model.vocab_size) == (2, 32, 2, 48, 263)
    assert (model.dropout, model.loss_chunk, model.init_std) == (0.1, 7, 0.5)
    # What is recorded is the name that the user gave; what is read is the file.
    assert config.data.tokenizer == str(folder) and data.tokenizer == str(folder / "tokenizer.json")


def test_without_from_nothing_changes() -> None:
    config = Config(model=GPTSettings(), data=TextDataSettings())
    assert complete_from(config) == (config, config.data) and weights_from(config.model) is None


def filled(config: Config) -> GPT:
    read = weights_from(config.model)
    network = GPT(config.model, config.model.vocab_size)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            assert read(name).shape == parameter.shape
            parameter.copy_(read(name))
    return network


@pytest.mark.parametrize("kind", ["gpt2-untied", "llama"])
def test_fewer_positions_and_more_rows(kind: str, model_named, saved, some_tokens) -> None:
    theirs = model_named(kind)
    config, _ = complete_from(config_of(saved(theirs), positions=24, vocab_size=320))
    logits, expected = filled(config)(some_tokens), theirs(some_tokens).logits
    torch.testing.assert_close(logits[..., :263], expected, rtol=1e-5, atol=1e-5)
    # A mean row's logit is the mean of the logits: no new token is likelier than the likeliest old one.
    torch.testing.assert_close(logits[..., 263:], expected.mean(-1, keepdim=True).expand(-1, -1, 57), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "words"), [
    ({"layers": 3, "width": 64}, ["model.layers 3 (there 2)", "model.width 64 (there 32)"]),
    ({"preset": "qwen3"}, ["model.preset qwen3 (there llama)"]),
    ({"positions": 64}, ["model.positions 64 (there 48)", "may be smaller"]),
    ({"vocab_size": 260}, ["model.vocab_size 260 (there 263)", "larger"]),
    ({"bias": True, "window": 8}, ["model.bias True (there False)", "model.window 8 (there None)"]),
    ({"rope_factor": 2.0}, ["model.rope_factor 2.0 (there 4.0)"]),
])  # fmt: skip
def test_settings_that_contradict_the_model(model: dict, words: list[str], folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        complete_from(config_of(folder, **model))
    for word in (f"model.from: {folder}", *words):
        assert word in str(caught.value), str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(folder: Path, tmp_path: Path) -> None:
    large = train_bpe(["the quick brown fox jumps over the lazy dog"] * 9, 290, tmp_path / "large")
    ids = load_tokenizer(str(large)).vocab_size
    assert ids > 263
    with pytest.raises(UserError, match=f"263 rows.*fewer than the {ids} tokens of data.tokenizer {large}.*vocab_size {ids}"):
        complete_from(config_of(folder, tokenizer=str(large)))
    complete_from(config_of(folder, tokenizer=str(large), vocab_size=ids))
    shutil.copy(large, folder / "tokenizer.json")
    with pytest.raises(UserError, match=f"263 rows.*fewer than the {ids} tokens"):
        complete_from(config_of(folder))


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model.from: .* holds no tokenizer.json; set data.tokenizer"):
        complete_from(config_of(folder))


# --- as the user writes it --------------------------------------------------------------------------------------------


def test_from_on_the_command_line_in_help_and_in_yaml(folder: Path, tiny_config: Path, config_from, genscale) -> None:
    for arguments in (["--model.from", folder], [f"--model.from={folder}"], ["--config", config_from(folder)]):
        printed = genscale("train", *arguments, "--print_config")
        assert printed.code == 0, printed.err
        model = yaml.safe_load(printed.out)["model"]
        assert model["from"] == str(folder) and "from_" not in model
    described = genscale("train", "--help").out
    assert "--model.from FROM" in described and "from_" not in described.lower()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--model.from_", "x"], ["--model.from_", "'model.from'"]),
    (["--model.from", "nowhere/at/all"], ["model.from: there is no folder nowhere/at/all"]),
    (["--model.fron", "x"], ["--model.fron", "'model.from'"]),
    (["--model.from"], ["model.from", "expected one argument"]),
])  # fmt: skip
def test_what_is_wrong_with_it(arguments: list[str], words: list[str], genscale, tiny_config: Path) -> None:
    message = genscale("train", "--config", tiny_config, *arguments).message_of_run()
    for word in words:
        assert word in message, message


def test_a_value_that_is_no_text(tiny_config: Path, refuse) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["model"]["from"] = [1]
    tiny_config.write_text(yaml.safe_dump(content))
    assert refuse(config=tiny_config) == "model.from: must be text, or null, not [1]"


def test_a_config_with_the_fields_name_is_told_the_key(tiny_config: Path, refuse) -> None:
    content = yaml.safe_load(tiny_config.read_text())
    content["model"]["from_"] = "x"
    tiny_config.write_text(yaml.safe_dump(content))
    assert "model.from_: unknown key" in refuse(config=tiny_config) and "'model.from'" in refuse(config=tiny_config)


def test_a_run_of_our_own_is_a_start_like_any_other(trained: Path) -> None:
    latest = Checkpoint(trained / "checkpoints" / "step-00000006")
    for name in (trained, latest.path):
        config, data = complete_from(config_of(name))
        assert (config.model.layers, config.model.width, config.model.vocab_size) == (2, 32, 320)
        assert data.tokenizer == str(trained / "tokenizer.json")
        read, stored = weights_from(config.model), latest.tensors("networks", "gpt")
        assert read is not None and all(torch.equal(read(key), stored(key)) for key in stored.shapes())
