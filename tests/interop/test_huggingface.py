"""Weights that transformers wrote, in our GPT: the same logits, the same gradients; and every folder that is no good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, GPT2Config, GPT2Model, PreTrainedModel

from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.interop.huggingface import open_huggingface


def opened(folder: Path) -> GPT:
    """Our network with the folder's weights."""
    fields, read = open_huggingface(str(folder))
    network = GPT(GPTSettings(**fields), fields["vocab_size"])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(read(name))
    return network


def edit_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def test_logits_and_gradients_equal_transformers(kind: str, model_named, saved, some_tokens, tmp_path: Path) -> None:
    theirs: PreTrainedModel = model_named(kind)
    network = opened(saved(theirs))
    logits, expected = network(some_tokens), theirs(some_tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    inputs, targets = some_tokens[:, :-1], some_tokens[:, 1:]
    (network(inputs, targets=targets) / targets.numel()).backward()
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), targets.flatten()).backward()
    # Gradients lie as the weights do: written in their place, they are read back under our names.
    save_file({name: parameter.grad.contiguous() for name, parameter in theirs.named_parameters()},
              tmp_path / "model" / "model.safetensors")
    _, read = open_huggingface(str(tmp_path / "model"))
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, read(name), rtol=1e-5, atol=1e-5, msg=name)


def test_sharded_files(model_named, saved, some_tokens) -> None:
    theirs = model_named("qwen3")
    folder = saved(theirs, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(opened(folder)(some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_fp32(dtype: torch.dtype, model_named, saved, some_tokens) -> None:
    folder = saved(model_named("llama").to(dtype))
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == dtype
    network, theirs = opened(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(network(some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)
    _, read = open_huggingface(str(folder))
    assert read("final_norm.weight").dtype == torch.float32


def test_names_without_the_prefix_as_in_gpt2_on_the_hub(model_named, saved, some_tokens) -> None:
    theirs = model_named("gpt2")
    folder = saved(theirs)
    body: GPT2Model = theirs.transformer
    body.save_pretrained(folder)
    assert "wte.weight" in load_file(folder / "model.safetensors")
    torch.testing.assert_close(opened(folder)(some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_keys_of_transformers_4(model_named, saved, some_tokens) -> None:
    theirs = model_named("llama3-tied")
    folder = saved(theirs)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope["type"] = rope.pop("rope_type")
    edit_config(folder, rope_parameters="absent", rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    torch.testing.assert_close(opened(folder)(some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)


# --- what cannot be read ----------------------------------------------------------------------------------------------


def refused(folder: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_huggingface(str(folder))
    for word in ("model.from", *words):
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("name", "changes", "words"), [
    ("llama", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
     ["MistralForCausalLM", "GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM"]),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "supported"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
    ("llama", {"attention_bias": True}, ["mlp_bias False", "True"]),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, ["rope_type 'yarn'", "llama3"]),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["lacks rope_scaling.factor"]),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config 'fp8'"]),
    ("llama", {"hidden_size": "absent", "vocab_size": "absent"}, ["lacks", "hidden_size", "vocab_size"]),
    ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers 0", "at least 1"]),
    ("llama", {"num_hidden_layers": 4}, ["weights are missing", "model.layers.2.", "and 15 more"]),
    ("llama", {"intermediate_size": 64}, ["model.layers.0.mlp.up_proj.weight", "[48, 32]", "[64, 32]"]),
    ("llama", {"vocab_size": 300}, ["model.embed_tokens.weight", "[263, 32]", "[300, 32]"]),
    ("gpt2", {"activation_function": "relu"}, ["activation_function 'relu'", "gelu_new"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx True"]),
    ("gpt2", {"tie_word_embeddings": False}, ["weights are missing", "lm_head.weight"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias True"]),
    ("qwen3-window-tied", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types", "the same for all"]),
])  # fmt: skip
def test_a_config_that_does_not_fit(name: str, changes: dict, words: list[str], model_named, saved) -> None:
    folder = saved(model_named(name))
    edit_config(folder, **changes)
    refused(folder, str(folder), *words)


def test_another_architecture(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    refused(tmp_path, "bert", "supported: GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM")


def test_folders_that_are_not_whole(model_named, saved, tmp_path: Path) -> None:
    folder = saved(model_named("llama"), max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    refused(folder, shards[1].name, "damaged")
    shards[1].unlink()
    refused(folder, shards[1].name, "missing")
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "index.json is damaged")
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, "no model.safetensors", "pytorch_model.bin is a pickle")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json cannot be read")
    (folder / "config.json").write_text("[]")
    refused(folder, "not an object")
    (folder / "config.json").unlink()
    refused(folder, "no config.json", "save_pretrained")
    refused(tmp_path / "modle", "no folder", "'model'")
    refused(tmp_path / "model" / "tokenizer.json", "no folder")


def test_quantised_weights(model_named, saved) -> None:
    folder = saved(model_named("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "model.norm.weight is I8", "floating-point")


def test_defaults_are_those_of_transformers(model_named, saved, some_tokens) -> None:
    theirs = model_named("gpt2")
    folder = saved(theirs)
    defaults = GPT2Config()
    for key in ("activation_function", "layer_norm_epsilon", "n_inner", "tie_word_embeddings", "scale_attn_weights"):
        assert getattr(theirs.config, key) == getattr(defaults, key)
        edit_config(folder, **{key: "absent"})
    torch.testing.assert_close(opened(folder)(some_tokens), theirs(some_tokens).logits, rtol=1e-5, atol=1e-5)
