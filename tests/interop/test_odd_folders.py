"""Model folders that are put together otherwise than transformers writes them, or by somebody who means harm."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from genscale.errors import UserError
from genscale.families.gpt.network import GPT
from genscale.families.gpt.settings import GPTSettings, parameter_count, resolved
from genscale.interop.huggingface import open_huggingface

EMBEDDING = {"llama3-tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    fields, read = open_huggingface(str(folder))
    network = GPT(GPTSettings(**fields), fields["vocab_size"])
    network.load_state_dict({name: read(name) for name, _ in network.named_parameters()})
    return network.eval()(tokens)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_huggingface(str(folder))
    for word in ("model.from", *words):
        assert word in str(caught.value), str(caught.value)


# --- one table for tokens and logits, or two ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EMBEDDING)
@pytest.mark.parametrize("stored", ["head alone", "another head", "the same head", "table alone"])
def test_tied_weights_are_read_as_transformers_reads_them(kind, stored, model_named, saved, some_tokens, caplog) -> None:
    folder, name = saved(model_named(kind)), EMBEDDING[kind]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if stored == "head alone":
            tensors["lm_head.weight"] = tensors.pop(name)
        elif stored == "another head":
            tensors["lm_head.weight"] = tensors[name].flip(0).contiguous()
        elif stored == "the same head":
            tensors["lm_head.weight"] = tensors[name].clone()

    edit_tensors(folder, change)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with caplog.at_level(logging.WARNING, logger="genscale"):
        torch.testing.assert_close(logits_of(folder, some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)
    said = [record.getMessage() for record in caplog.records if record.name == "genscale"]
    assert len(said) == (stored == "another head"), said
    assert stored != "another head" or ("tie_word_embeddings" in said[0] and "lm_head.weight" in said[0])


def test_a_run_begins_with_the_head_that_the_folder_has(genscale, model_named, saved, tiny_config, tiny_run) -> None:
    folder = saved(model_named("llama3-tied"))
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(263, 32)}))
    done = genscale("train", "--config", tiny_config, "--model.from", folder, "--model.layers", 6, "--model.heads", 6,
                    "--model.width", 384, "--model.positions", 1024, "--data.sequence_length", 16, "--train.steps", 1,
                    "--train.checkpoint_every", 0)
    assert done.code == 0, done.err
    assert done.err.count("tie_word_embeddings") == 1 and "tied: false" in (tiny_run / "config.yaml").read_text()


# --- tensors that nobody asked for, or that are not what they should be --------------------------------------------------


def test_tensors_that_are_not_used_are_named_once(model_named, saved, caplog) -> None:
    folder = saved(model_named("llama"))
    odd = {f"model.layers.0.self_attn.{name}.bias": torch.zeros(4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    edit_tensors(folder, lambda tensors: tensors.update({**odd, **buffers}))
    with caplog.at_level(logging.WARNING, logger="genscale"):
        open_huggingface(str(folder))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "genscale"]
    assert all(word in said for word in ("4 are not used", "model.layers.0.self_attn.k_proj.bias", "and 1 more")), said
    assert "inv_freq" not in said


def test_buffers_of_older_versions_are_no_weights(model_named, saved, caplog) -> None:
    folder = saved(model_named("gpt2"))
    buffers = {f"transformer.h.{layer}.attn.{name}": torch.zeros(1) for layer in (0, 1) for name in ("bias", "masked_bias")}
    edit_tensors(folder, lambda tensors: tensors.update(buffers))
    with caplog.at_level(logging.WARNING, logger="genscale"):
        open_huggingface(str(folder))
    assert not [record for record in caplog.records if record.name == "genscale"]


# --- from strangers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(model_named, saved) -> Path:
    return saved(model_named("llama"), max_shard_size="20KB")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../outside.safetensors", "", "..",
                                  5, None, ["x"], "a\0b"])
def test_an_index_names_files_of_its_folder(name, sharded) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    shutil.copy(sharded / shard, sharded.parent / "outside.safetensors")
    content["weight_map"] = {key: name if file == shard else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    refused(sharded, "index.json")


def test_a_tensor_in_two_files_is_refused(sharded) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    refused(sharded, next(iter(sorted(tensors))), "another file")


def test_code_that_a_config_names_is_not_run(model_named, saved, some_tokens, caplog, tmp_path) -> None:
    theirs = model_named("llama")
    folder = saved(theirs)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"})
    with caplog.at_level(logging.WARNING, logger="genscale"):
        torch.testing.assert_close(logits_of(folder, some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)
    assert "auto_map" in caplog.text and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**8}, {"num_hidden_layers": 10**8, "use_sliding_window": True}, {"hidden_size": 10**12},
    {"intermediate_size": 2**30, "num_hidden_layers": 2000, "hidden_size": 2**20}, {"vocab_size": 10**30},
    {"num_attention_heads": 5}, {"num_key_value_heads": "2"}, {"rope_theta": "big", "rope_parameters": None},
    {"rope_scaling": 5}, {"rope_parameters": {"rope_type": ["x"]}}, {"architectures": [["x"]]},
    {"model_type": ["qwen3"]}, {"quantization_config": 5}, {"layer_types": 5}, {"layer_types": [["x"]]},
    {"tie_word_embeddings": "no"}, {"head_dim": 0}, {"rms_norm_eps": "x"},
    {"max_window_layers": "x", "use_sliding_window": True}, {"rope_parameters": {"rope_type": "linear", "factor": 0}},
], ids=range(20))  # fmt: skip
def test_a_config_that_means_harm_is_one_line(changes, model_named, saved) -> None:
    folder = saved(model_named("qwen3"))
    edit_config(folder, **changes)
    refused(folder, str(folder))


@pytest.mark.parametrize(("file", "text", "words"), [
    ("config.json", "[" * 100_000, "levels deep"),
    ("config.json", '{"model_type": "llama", "model_type": "gpt2"}', "two values"),
    ("config.json", b"\xff\xfe{\0}\0", "UTF-16"), ("model.safetensors.index.json", '{"a":' * 100_000, "levels deep"),
    ("model.safetensors.index.json", '{"weight_map": 5}', "damaged"), ("model.safetensors.index.json", "5", "damaged"),
    ("config.json", None, "named pipe"), ("model.safetensors.index.json", None, "save_pretrained"),
    ("model-00001-of-*", None, "no plain file"), ("model-00001-of-*", (2**40).to_bytes(8, "little") + b"{}", "damaged"),
    ("model-00001-of-*", (200_000).to_bytes(8, "little") + b'{"a":' * 40_000, "damaged"),
], ids=range(11))  # fmt: skip
def test_a_file_that_means_harm_is_one_line(file, text, words, sharded) -> None:
    (path,) = sharded.glob(file)
    path.unlink()
    if text is None:
        os.mkfifo(path)
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    refused(sharded, words)


def test_tensors_that_overlap_are_refused(model_named, saved) -> None:
    file = saved(model_named("llama")) / "model.safetensors"
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    refused(file.parent, "model.safetensors is damaged")


def test_parameters_are_counted_as_they_are() -> None:
    for preset in ("gpt2", "llama", "qwen3"):
        for changes in ({}, {"bias": True}, {"tied": True, "qk_norm": True}, {"tied": False, "norm": "layernorm"},
                        {"kv_heads": 2, "head_width": 10, "activation": "relu2"}, {"position_encoding": "learned"}):
            settings = resolved(GPTSettings(preset=preset, layers=3, heads=4, width=32, vocab_size=77, **changes))
            with torch.device("meta"):
                network = GPT(settings, 77)
            assert parameter_count(settings) == sum(parameter.numel() for parameter in network.parameters())
