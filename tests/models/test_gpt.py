"""The GPT against transformers' GPT-2, torch's flop counter and the closed forms of its initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from genscale.errors import UserError
from genscale.models.decoding import generate
from genscale.models.gpt import GPT, GPTSettings

SHAPES = [GPTSettings(layers=1, heads=1, width=8, positions=16), GPTSettings(layers=3, heads=4, width=32, positions=24),
          GPTSettings(layers=2, heads=3, width=48, positions=40, layer_norm_eps=1e-3)]


def made(settings: GPTSettings, vocab_size: int, seed: int = 0) -> GPT:
    """A GPT with initial weights."""
    network = GPT(settings, vocab_size)
    network.initialise(torch.Generator().manual_seed(seed))
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
        layer_norm_epsilon=s.layer_norm_eps, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0))
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


def test_initial_weights_depend_on_the_generator_alone() -> None:
    first = made(SHAPES[1], 61, seed=5)
    torch.manual_seed(99)
    again, other = made(SHAPES[1], 61, seed=5), made(SHAPES[1], 61, seed=6)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)


def test_flops_equal_torchs_count() -> None:
    settings = GPTSettings(layers=3, heads=4, width=64, positions=96)
    network = made(settings, vocab_size=160)
    tokens = torch.randint(160, (2, 96), generator=torch.Generator().manual_seed(7))
    # The counter knows no CPU attention kernel; the plain one is matrix products, which it knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(tokens).sum().backward()
    assert network.flops_per_token(96) * tokens.numel() == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_parameter_count_is_gpt2s() -> None:
    with torch.device("meta"):
        small = GPT(GPTSettings(layers=12, heads=12, width=768), vocab_size=50257)
    assert small.parameter_count() == 124_439_808  # the count of the released "gpt2" weights


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
