"""The GPT against transformers' GPT-2, Llama and Qwen3, torch's flop counter and the closed forms of its initialisation."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from genscale.errors import UserError
from genscale.families.gpt.decoding import generate
from genscale.families.gpt.network import GPT, GPTSettings, KeyValueCache
from genscale.models.device_kind import planned_on
from genscale.parallel.activation_checkpointing import checkpoint_activations

SHAPES = [GPTSettings(layers=1, heads=1, width=8, positions=16), GPTSettings(layers=3, heads=4, width=32, positions=24),
          GPTSettings(layers=2, heads=3, width=48, positions=40, norm_eps=1e-3)]


def made(settings: GPTSettings, vocab_size: int, seed: int = 0) -> GPT:
    """A GPT with initial weights."""
    network = GPT(settings, vocab_size)
    network.initialise(seed)
    return network


def scrambled(settings: GPTSettings, vocab_size: int) -> GPT:
    """A GPT none of whose parameters is zero or one, so that each has an effect that a comparison can see."""
    network = GPT(settings, vocab_size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return network


def pairs(network: GPT, theirs: GPT2LMHeadModel) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter, bool]]:
    """(ours, theirs, whether theirs is transposed) for every parameter."""
    other = theirs.transformer
    found = [(network.token_embedding.weight, other.wte.weight, False),
             (network.position_embedding.weight, other.wpe.weight, False)]
    modules = [(network.final_norm, other.ln_f, False)]
    for ours, block in zip(network.layers, other.h, strict=True):
        modules += [(ours.attention_norm, block.ln_1, False), (ours.mlp_norm, block.ln_2, False),
                    (ours.attention.query_key_value, block.attn.c_attn, True), (ours.attention.output, block.attn.c_proj, True),
                    (ours.mlp.up, block.mlp.c_fc, True), (ours.mlp.down, block.mlp.c_proj, True)]
    for ours, module, transposed in modules:
        found += [(ours.weight, module.weight, transposed), (ours.bias, module.bias, False)]
    return found


def twin(network: GPT) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of ours."""
    s = network.settings
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=network.vocab_size, n_positions=s.positions, n_embd=s.width, n_layer=s.layers, n_head=s.heads,
        layer_norm_epsilon=s.norm_eps, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for ours, other, transposed in pairs(network, theirs):
            other.copy_(ours.T if transposed else ours)
    return theirs


@pytest.mark.parametrize("settings", SHAPES)
def test_logits_and_gradients_equal_transformers(settings: GPTSettings) -> None:
    network = scrambled(settings, vocab_size=61)
    theirs = twin(network)
    matched = pairs(network, theirs)
    assert len(matched) == len(list(network.parameters())) == len(list(theirs.parameters()))

    tokens = torch.randint(61, (3, settings.positions), generator=torch.Generator().manual_seed(2))
    logits, expected = network(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for ours, other, transposed in matched:
        torch.testing.assert_close(ours.grad, other.grad.T if transposed else other.grad, rtol=1e-5, atol=1e-5)


ROTARY = [
    GPTSettings(preset="llama", layers=2, heads=4, width=32, positions=48, rope_base=1e4),
    GPTSettings(preset="llama", layers=2, heads=6, kv_heads=2, width=48, mlp_width=40, positions=48, tied=True),
    GPTSettings(preset="llama", layers=2, heads=4, kv_heads=1, width=32, positions=48, bias=True, rope_scaling="linear",
                rope_factor=3.0),
    GPTSettings(preset="llama", layers=1, heads=2, width=64, positions=48, rope_scaling="llama3", rope_factor=8.0,
                rope_original_positions=32, rope_base=100.0),
    GPTSettings(preset="qwen3", layers=2, heads=4, kv_heads=2, head_width=16, width=32, positions=48),
]


def rotary_twin(network: GPT) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """transformers' Llama or Qwen3 of the same shape."""
    s = network.settings
    rope = {"rope_theta": s.rope_base, "rope_type": "default"}
    if s.rope_scaling != "none":
        rope |= {"rope_type": s.rope_scaling, "factor": s.rope_factor, "low_freq_factor": s.rope_low_frequency,
                 "high_freq_factor": s.rope_high_frequency, "original_max_position_embeddings": s.rope_original_positions}
    shape = {"vocab_size": network.vocab_size, "hidden_size": s.width, "intermediate_size": s.mlp_width,
             "head_dim": s.head_width, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
             "num_key_value_heads": s.kv_heads, "max_position_embeddings": s.positions, "rms_norm_eps": s.norm_eps,
             "tie_word_embeddings": s.tied, "attention_bias": s.bias, "rope_parameters": rope}
    return Qwen3ForCausalLM(Qwen3Config(**shape)) if s.qk_norm else LlamaForCausalLM(LlamaConfig(mlp_bias=s.bias, **shape))


def rotary_names(s: GPTSettings) -> dict[str, list[str]]:
    """Each of our parameters, and theirs whose rows it holds one after the other."""
    names = {"token_embedding.weight": ["model.embed_tokens.weight"], "final_norm.weight": ["model.norm.weight"]}
    if not s.tied:
        names["output.weight"] = ["lm_head.weight"]
    for i in range(s.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names |= {f"{ours}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
                  f"{ours}.mlp_norm.weight": [f"{theirs}.post_attention_layernorm.weight"]}
        if s.qk_norm:
            names |= {f"{ours}.attention.{x}_norm.weight": [f"{theirs}.self_attn.{x[0]}_norm.weight"] for x in ("query", "key")}
        for kind in ("weight", "bias") if s.bias else ("weight",):
            names |= {f"{ours}.attention.query_key_value.{kind}": [f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"],
                      f"{ours}.attention.output.{kind}": [f"{theirs}.self_attn.o_proj.{kind}"],
                      **{f"{ours}.mlp.{x}.{kind}": [f"{theirs}.mlp.{x}_proj.{kind}"] for x in ("up", "gate", "down")}}
    return names


@pytest.mark.parametrize("settings", ROTARY, ids=["llama", "grouped", "linear", "llama3", "qwen3"])
def test_rotary_models_equal_transformers(settings: GPTSettings) -> None:
    network = scrambled(settings, vocab_size=61)
    theirs = rotary_twin(network)
    names = rotary_names(network.settings)
    assert names.keys() == dict(network.named_parameters()).keys()
    assert sum(map(len, names.values())) == len(list(theirs.parameters()))
    with torch.no_grad():
        for ours, parts in names.items():
            others = [theirs.get_parameter(part) for part in parts]
            for other, rows in zip(others, network.get_parameter(ours).split([len(other) for other in others]), strict=True):
                other.copy_(rows)

    tokens = torch.randint(61, (3, settings.positions), generator=torch.Generator().manual_seed(2))
    logits, expected = network(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for ours, parts in names.items():
        wanted = torch.cat([theirs.get_parameter(part).grad for part in parts])
        torch.testing.assert_close(network.get_parameter(ours).grad, wanted, rtol=1e-5, atol=1e-5, msg=ours)


class Counted(TorchDispatchMode):
    """Counts the calls of an operation."""

    def __init__(self, operation: torch._ops.OpOverload) -> None:
        super().__init__()
        self.operation, self.calls = operation, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.operation
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_angles_are_computed_once_for_all_layers(recomputed: str) -> None:
    network = scrambled(GPTSettings(preset="qwen3", layers=3, heads=2, width=16, positions=32), vocab_size=61)
    checkpoint_activations(network.blocks(), recomputed)
    tokens = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(4))
    with Counted(torch.ops.aten.cos.default) as cosines:
        network(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    assert cosines.calls == 1


@pytest.mark.parametrize("settings", [SHAPES[1], *ROTARY], ids=lambda s: s.preset)
def test_a_cache_changes_nothing(settings: GPTSettings) -> None:
    network = scrambled(settings, vocab_size=61)
    tokens = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 20, [0] * 5 + [1] * 15, [0] * 9 + [1] * 11])
    for given in (None, documents):
        whole = network(tokens, documents=given)
        cache = KeyValueCache(settings.layers, capacity=20)
        parts = [network(tokens[:, a:b], documents=None if given is None else given[:, a:b], cache=cache)
                 for a, b in [(0, 7), (7, 12), *((i, i + 1) for i in range(12, 20))]]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(tokens, last=1), network(tokens)[:, -1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [SHAPES[1], ROTARY[1], ROTARY[4]], ids=["gpt2", "llama", "qwen3"])
def test_packed_documents_that_see_only_themselves_are_as_if_alone(settings: GPTSettings) -> None:
    network = scrambled(settings, vocab_size=61)
    tokens = torch.randint(61, (1, 21), generator=torch.Generator().manual_seed(4))
    bounds = [0, 3, 4, 13, 20]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(bounds).diff())[None]
    packed = network(tokens[:, :-1], targets=tokens[:, 1:], documents=documents)
    alone = sum(network(tokens[:, a:b], targets=tokens[:, a + 1:b + 1]) for a, b in pairwise(bounds))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    assert network(tokens[:, :-1], targets=tokens[:, 1:]).item() != pytest.approx(alone.item(), rel=1e-3)


def test_a_window_hides_what_is_further_away() -> None:
    near = scrambled(GPTSettings(preset="llama", layers=1, heads=2, width=16, positions=32, window=4), vocab_size=61)
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(5))
    changed = tokens.clone()
    changed[:, 8] = (tokens[:, 8] + 1) % 61
    differs = (near(tokens) - near(changed)).abs().amax(-1)[0] > 1e-5
    assert differs.nonzero().flatten().tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(("activation", "closed"), [("relu2", lambda up, gate: up.clamp(min=0) ** 2),
                                                    ("swiglu", lambda up, gate: gate * torch.sigmoid(gate) * up)])
def test_activations_are_their_formulas(activation: str, closed) -> None:
    mlp = scrambled(GPTSettings(layers=1, heads=1, width=8, activation=activation, bias=False), 61).layers[0].mlp
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6))
    gate = x @ mlp.gate.weight.T if activation == "swiglu" else None
    torch.testing.assert_close(mlp(x), closed(x @ mlp.up.weight.T, gate) @ mlp.down.weight.T)


def test_a_position_sees_only_itself_and_those_before_it() -> None:
    network = scrambled(SHAPES[1], vocab_size=61)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[:, 12] = (tokens[:, 12] + 1) % 61
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-6)
    assert ((before - after)[:, 12:].abs().amax(-1) > 1e-4).all()


def test_initial_weights_are_those_of_gpt2() -> None:
    settings = GPTSettings(layers=8, heads=4, width=128, positions=256, init_std=0.03)
    network = made(settings, vocab_size=512)
    expected = {"output.weight": 0.03 / math.sqrt(16), "down.weight": 0.03 / math.sqrt(16)}
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = next((value for end, value in expected.items() if name.endswith(end)), 0.03)
            # The standard error of a measured deviation is std / sqrt(2 n), and n is at least 16,384.
            assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel())), name
            assert parameter.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(parameter.numel())), name

    tokens = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(4))
    loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(512), rel=0.02)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    first = made(SHAPES[1], 61, seed=5)
    torch.manual_seed(99)
    again, other = made(SHAPES[1], 61, seed=5), made(SHAPES[1], 61, seed=6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)
    with torch.device("meta"):
        unmade = GPT(SHAPES[1], 61)
    for name in reversed(list(dict(unmade.named_parameters()))):  # one by one and in any order
        assert torch.equal(unmade.initial_weight(name, 5), first.get_parameter(name)), name


@pytest.mark.parametrize("settings", [
    GPTSettings(layers=3, heads=4, width=64, positions=96),
    GPTSettings(preset="llama", layers=2, heads=4, kv_heads=2, width=64, positions=96),
    GPTSettings(preset="qwen3", layers=2, heads=4, kv_heads=1, head_width=32, width=64, positions=96)], ids=lambda s: s.preset)
def test_flops_equal_torchs_count(settings: GPTSettings) -> None:
    network = made(settings, vocab_size=160)
    tokens = torch.randint(160, (2, 96), generator=torch.Generator().manual_seed(7))
    # The counter knows no CPU attention kernel; the plain one is matrix products, which it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(tokens).sum().backward()
    assert network.flops_per_token(96) * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_parameter_counts_are_those_of_the_released_models() -> None:
    with torch.device("meta"):
        small = GPT(GPTSettings(layers=12, heads=12, width=768), vocab_size=50257)
        llama = GPT(GPTSettings(preset="llama", layers=32, heads=32, kv_heads=8, width=4096, mlp_width=14336),
                    vocab_size=128256)
        qwen = GPT(GPTSettings(preset="qwen3", layers=28, heads=16, kv_heads=8, head_width=128, width=1024, mlp_width=3072,
                               tied=True), vocab_size=151936)
    assert small.parameter_count() == 124_439_808  # the count of the released "gpt2" weights
    assert llama.parameter_count() == 8_030_261_248  # Llama-3.1-8B
    assert qwen.parameter_count() == 596_049_920  # Qwen3-0.6B


def test_blocks_are_the_parts_that_the_forward_runs() -> None:
    network = scrambled(SHAPES[1], vocab_size=61)
    seen: list[torch.nn.Module] = []
    for block in network.blocks():
        block.register_forward_hook(lambda module, args, out: seen.append(module))
    network(torch.zeros(1, 5, dtype=torch.int64))
    assert seen == network.blocks() and len(seen) == 3


@pytest.mark.parametrize(("width", "heads", "hints"), [(385, 6, ("model.heads 5 or 7", "model.width 384 or 390")),
                                                       (4, 8, ("model.heads 2 or 4", "model.width 8"))])
def test_heads_must_divide_the_width(width: int, heads: int, hints: tuple[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        GPT(GPTSettings(heads=heads, width=width), vocab_size=61)
    message = str(caught.value)
    assert message.startswith(f"model.heads: {heads} ") and str(width) in message
    assert all(hint in message for hint in hints) and "or 0" not in message


@pytest.mark.parametrize(("settings", "words"), [
    ({"heads": 6, "kv_heads": 4}, ["model.kv_heads: 4", "model.heads 6", "2 or 3"]),
    ({"preset": "llama", "head_width": 7}, ["model.head_width: 7", "8"]),
    ({"dropout": 1.0}, ["model.dropout: 1.0", "0.1"]),
    ({"preset": "llama", "rope_factor": 8.0}, ["model.rope_factor: 8.0", "linear or llama3"]),
    ({"rope_scaling": "linear"}, ["model.rope_scaling: linear", "rotary", "learned"]),
    ({"preset": "llama", "rope_scaling": "llama3", "rope_high_frequency": 0.5}, ["model.rope_high_frequency: 0.5", "4 and 1"]),
])
def test_settings_that_no_gpt_can_have(settings: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        GPT(GPTSettings(**settings), vocab_size=61)
    assert all(word in str(caught.value) for word in words)


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit into 16 positions"):
        made(SHAPES[0], vocab_size=61)(torch.zeros(1, 17, dtype=torch.int64))


def test_greedy_decoding_equals_transformers() -> None:
    network = made(GPTSettings(layers=2, heads=3, width=48, positions=40, init_std=0.3), vocab_size=61)
    prompts = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(8))
    expected = twin(network).eval().generate(prompts, max_new_tokens=34, do_sample=False, eos_token_id=None, pad_token_id=0,
                                             attention_mask=torch.ones_like(prompts))
    ours = generate(network, prompts, 34, positions=40, generators=[torch.Generator()] * 2, temperature=0)
    assert torch.equal(ours, expected) and len(set(ours[0, 6:].tolist())) > 3


class Kernels(TorchFunctionMode):
    """Notes how attention and normalisation are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.alike = [], []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.shared.append(kwargs["enable_gqa"])
        if function is F.rms_norm:
            self.alike.append(args[0].dtype == (*args[2:3], (kwargs or {}).get("weight"))[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_is_asked_for_what_it_has_kernels_for(precision):
    """None in fp32 shares keys among queries (CUDA would compute all scores in the open), and none normalises bf16 by weights
    in fp32."""
    settings = GPTSettings(preset="qwen3", layers=1, heads=4, kv_heads=2, width=32, positions=8)
    network = GPT(settings, 16)
    network.initialise(0)
    tokens = torch.randint(16, (2, 8))
    with planned_on("gpu"), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Kernels() as gpu:
        network(tokens)
    assert gpu.shared == [precision == "bf16"]
    assert all(gpu.alike) and len(gpu.alike) == 5
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), Kernels() as cpu:
        network(tokens)
    assert cpu.shared == [False]
