"""Folders that we write: transformers reads the same model and the same tokenizer out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from genscale.data.text.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings, resolved
from genscale.interop.architectures import class_for
from genscale.interop.export import Source, export
from genscale.interop.huggingface import open_huggingface
from genscale.interop.weights import write_weights

ROWS = 263
SHAPE = {"layers": 2, "heads": 4, "width": 32, "positions": 48}
SETTINGS = {
    "gpt2": GPTSettings(**SHAPE, dropout=0.1),
    "gpt2-no-bias": GPTSettings(**SHAPE, bias=False, tied=False, norm_eps=1e-3, mlp_width=40),
    "llama": GPTSettings(**SHAPE, preset="llama", kv_heads=2),
    "llama-bias-stretched": GPTSettings(**SHAPE, preset="llama", bias=True, tied=True, rope_scaling="llama3", rope_factor=4.0,
                                        rope_original_positions=16),
    "llama-linear": GPTSettings(**SHAPE, preset="llama", head_width=16, rope_scaling="linear", rope_factor=2.0),
    "qwen3": GPTSettings(**SHAPE, preset="qwen3", kv_heads=1, head_width=12),
    "qwen3-window": GPTSettings(**SHAPE, preset="qwen3", window=5, tied=True),
}
CLASS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def scrambled(settings: GPTSettings) -> GPT:
    """A GPT none of whose weights is zero or one."""
    network = GPT(settings, ROWS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return network


def source_of(network: GPT, tokenizer: Tokenizer, kept: Path = Path("nothing")) -> Source:
    weights = dict(network.named_parameters())
    return Source(network.settings, ROWS, lambda name: weights[name].detach(), tokenizer, kept)


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_has_equal_logits(name: str, some_tokens: Tensor, tmp_path: Path) -> None:
    network = scrambled(SETTINGS[name])
    assert export(source_of(network, ByteTokenizer()), tmp_path / "out", torch.float32, network) < 1e-5
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(theirs).__name__ == CLASS[name.partition("-")[0]] and theirs.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in theirs.parameters())
    torch.testing.assert_close(theirs(some_tokens).logits, network(some_tokens), rtol=1e-5, atol=1e-5)


def test_half_the_size(some_tokens: Tensor, tmp_path: Path) -> None:
    network, rounded = scrambled(SETTINGS["llama"]), scrambled(SETTINGS["llama"])
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    export(source_of(network, ByteTokenizer()), tmp_path / "out", torch.bfloat16, rounded)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(theirs(some_tokens).logits, rounded(some_tokens), rtol=1e-5, atol=1e-5)


def test_shards(some_tokens: Tensor, tmp_path: Path) -> None:
    network = scrambled(SETTINGS["qwen3"])
    export(source_of(network, ByteTokenizer()), tmp_path / "out", torch.float32, network, shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    # One embedding alone is larger than a shard; nothing else may exceed it.
    assert sum(shard.stat().st_size > 21_000 for shard in shards) == 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in network.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(some_tokens).logits, network(some_tokens), rtol=1e-5, atol=1e-5)
    fields, read = open_huggingface(str(tmp_path / "out"))
    assert resolved(GPTSettings(**fields)) == replace(network.settings, vocab_size=ROWS)
    assert all(torch.equal(read(name), parameter) for name, parameter in network.named_parameters())


def test_there_and_back_changes_no_byte(kind: str, model_named, saved, tmp_path: Path) -> None:
    folder = saved(model_named(kind))
    fields, read = open_huggingface(str(folder))
    network = GPT(GPTSettings(**fields), ROWS)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(read(name))
    export(source_of(network, ByteTokenizer()), tmp_path / "back", torch.float32, network)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "back"))
    differing = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert differing <= {"_name_or_path", "n_inner", "n_ctx"}  # n_inner is written out where it was left open


# --- the tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = ["Hello  world\n\n\t x", "Größe 漢字 🙂👩‍👩‍👧 e\u0301", "\x00\x01\x7f\u00a0\ufeff\u200b", " lead", "trail ", "",
         "a" * 500, "".join(chr(code) for code in range(1, 0x2000, 7)), "'s 've 12345"]


def bpe(folder: Path) -> Tokenizer:
    return load_tokenizer(str(train_bpe(TEXTS * 3, 300, folder / "bpe")))


@pytest.mark.parametrize("make", [lambda folder: ByteTokenizer(), bpe], ids=["bytes", "bpe"])
def test_autotokenizer_has_equal_ids(make: Callable[[Path], Tokenizer], tmp_path: Path) -> None:
    tokenizer, network = make(tmp_path), scrambled(SETTINGS["gpt2"])
    export(source_of(network, tokenizer), tmp_path / "out", torch.float32, network)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == ids and theirs.decode(ids) == tokenizer.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text
    assert theirs("x<|endoftext|>").input_ids == [*tokenizer.encode("x"), tokenizer.end_of_text]
    assert theirs.decode([*tokenizer.encode("x"), tokenizer.end_of_text], skip_special_tokens=True) == "x"
    assert theirs.model_max_length == 48 and len(theirs) == tokenizer.vocab_size
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.end_of_text
    # And our own reader finds the same tokenizer in the folder.
    ours = load_tokenizer(str(tmp_path / "out"))
    assert [ours.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert list(ours.token_bytes()) == list(tokenizer.token_bytes())


def test_chat_template_and_special_tokens_are_handed_on(tmp_path: Path) -> None:
    folder, network = tmp_path / "chat", scrambled(SETTINGS["gpt2"])
    train_bpe(TEXTS * 3, 260, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 260, "content": "<|turn|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    settings = {"eos_token": {"content": "<|turn|>"}, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    export(source_of(network, tokenizer, tmp_path / "kept"), tmp_path / "out", torch.float32, network)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi<|turn|>"
    assert theirs.eos_token_id == 260 != tokenizer.end_of_text
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.temperature == 0.6 and generation.eos_token_id == [tokenizer.end_of_text, 260]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "words"), [
    ({"activation": "relu2"}, ["GPT2LMHeadModel", "model.activation relu2 (but gelu)"]),
    ({"window": 8, "qk_norm": True}, ["GPT2LMHeadModel", "model.qk_norm true (but false)", "model.window 8 (but none)"]),
    ({"preset": "llama", "activation": "relu2"}, ["LlamaForCausalLM", "model.activation relu2 (but swiglu)"]),
    ({"preset": "llama", "window": 8}, ["LlamaForCausalLM", "model.window 8 (but none)"]),
    ({"preset": "qwen3", "bias": True}, ["LlamaForCausalLM", "model.qk_norm true (but false)"]),
    ({"kv_heads": 2}, ["GPT2LMHeadModel", "model.kv_heads 2 (but 4)"]),
    ({"head_width": 4}, ["GPT2LMHeadModel", "model.head_width 4 (but 8)"]),
    ({"preset": "llama", "heads": 5, "head_width": 8}, ["LlamaForCausalLM", "model.heads 5 (but divisors of model.width 32)"]),
])  # fmt: skip
def test_options_that_no_class_has(settings: dict, words: list[str], tmp_path: Path) -> None:
    network = scrambled(GPTSettings(**SHAPE | settings))
    with pytest.raises(UserError) as caught:
        export(source_of(network, ByteTokenizer()), tmp_path / "out", torch.float32, network)
    for word in ("export: no Hugging Face class", *words):
        assert word in str(caught.value), str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_qwen3_with_a_head_width_of_its_own_has_a_class() -> None:
    assert class_for(resolved(GPTSettings(preset="qwen3", width=30, heads=4, head_width=8))) == "qwen3"


def test_a_model_that_transformers_reads_otherwise_is_not_left_behind(tmp_path: Path) -> None:
    network, other = scrambled(SETTINGS["llama"]), scrambled(SETTINGS["llama"])
    with torch.no_grad():
        other.layers[1].attention.output.weight[3, 5] += 0.05
    assert export(source_of(network, ByteTokenizer()), tmp_path / "good", torch.float32, network) < 1e-5
    with pytest.raises(UserError, match="another model.*nothing was left behind"):
        export(source_of(network, ByteTokenizer()), tmp_path / "out", torch.float32, other)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_tokenizer_that_transformers_reads_otherwise_is_not_left_behind(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        def encode_batch(self, texts):
            return [[*ids[:-1], 0] for ids in super().encode_batch(texts)]

    network = scrambled(SETTINGS["gpt2"])
    with pytest.raises(UserError, match="another tokenizer.*nothing was left behind"):
        export(source_of(network, Other()), tmp_path / "out", torch.float32, network)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(small_disk) -> None:
    disk = small_disk("64k")
    network = scrambled(SETTINGS["gpt2"])
    with pytest.raises(UserError, match="--out: cannot write .*nothing was left"):
        export(source_of(network, ByteTokenizer()), disk / "out", torch.float32, network)
    assert list(disk.iterdir()) == []


def test_writing_is_the_inverse_of_reading_for_tensors_of_any_layout(tmp_path: Path) -> None:
    """A transposed view of a tensor is written as what it shows, not as it lies."""
    network = scrambled(SETTINGS["gpt2"])
    weights = {name: parameter.detach().mT.contiguous().mT if parameter.ndim == 2 else parameter.detach()
               for name, parameter in network.named_parameters()}
    write_weights("gpt2", network.settings, ROWS, weights.__getitem__, torch.float32, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.weight"], weights["layers.1.mlp.up.weight"].T)
