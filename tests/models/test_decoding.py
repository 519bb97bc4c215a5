"""Decoding against transformers: its logit filters and its greedy search; and with a cache and in batches against without."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from genscale.errors import UserError
from genscale.families.gpt.attention import KeyValueCache
from genscale.families.gpt.decoding import choose, filter_logits, generate, left_padded, stream
from genscale.families.gpt.network import GPT, GPTSettings


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    """A GPT-2 of transformers with large weights, so that its choices vary."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=67, n_positions=48, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
                                      bos_token_id=0, eos_token_id=0)).eval()


class Logits(torch.nn.Module):
    """transformers' model as a plain function of tokens; `generate` must not care whose network it drives."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model, self.lengths = model, []
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.lengths.append(tokens.shape[1])
        return self.model(tokens).logits


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("top_k", [1, 7, 500])
def test_top_k_equals_transformers(top_k: int) -> None:
    logits = torch.randn(50, 90, generator=torch.Generator().manual_seed(1)) * 3
    assert torch.equal(filter_logits(logits, top_k=top_k), TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_equals_transformers(top_p: float) -> None:
    logits = torch.randn(50, 90, generator=torch.Generator().manual_seed(2)) * 3
    assert torch.equal(filter_logits(logits, top_p=top_p), TopPLogitsWarper(top_p)(None, logits))


def test_the_likeliest_token_stays_where_top_p_or_the_temperature_is_below_what_fp32_holds() -> None:
    logits = torch.randn(50, 90, generator=torch.Generator().manual_seed(4)) * 300
    likeliest = logits.argmax(-1)
    assert torch.equal(filter_logits(logits, top_p=1e-50).isfinite().nonzero()[:, 1], likeliest)
    for temperature in (1e-36, 1e-46, 1e-300, 5e-324):
        assert torch.equal(choose(logits, temperature, None, None, generators(*range(50))), likeliest)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_no_token(temperature: float) -> None:
    with pytest.raises(UserError, match="diverged"):
        choose(torch.tensor([[0.0, float("nan")]]), temperature, None, None, generators(0))


def test_top_k_then_top_p_equals_transformers() -> None:
    logits = torch.randn(50, 90, generator=torch.Generator().manual_seed(3)) * 3
    expected = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(5)(None, logits))
    assert torch.equal(filter_logits(logits, top_k=5, top_p=0.7), expected)


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits, draws = torch.tensor([[0.0, 1.0, 2.0, -1.0]]), 20_000
    one = generators(4)[0]
    drawn = torch.cat([choose(logits, 0.5, None, None, [one]) for _ in range(draws)])
    shares = drawn.bincount(minlength=4) / draws
    expected = (logits[0] / 0.5).softmax(-1)
    # Five standard errors of a share: sqrt(p (1 - p) / draws).
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_greedy_equals_transformers(theirs: GPT2LMHeadModel) -> None:
    prompts = torch.randint(1, 67, (3, 5), generator=torch.Generator().manual_seed(5))
    expected = theirs.generate(prompts, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = generate(Logits(theirs), prompts, 40, positions=48, generators=generators(0, 0, 0), temperature=0)
    assert torch.equal(ours, expected)


def test_rows_stop_at_the_end_of_text(theirs: GPT2LMHeadModel) -> None:
    prompts = torch.randint(1, 67, (3, 5), generator=torch.Generator().manual_seed(5))
    free = generate(Logits(theirs), prompts, 30, positions=48, generators=generators(0, 0, 0), temperature=0)
    end = int(free[0, 9])  # the first row ends with its fifth new token at the latest
    expected = theirs.generate(prompts, max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=end,
                               attention_mask=torch.ones_like(prompts))
    ours = generate(Logits(theirs), prompts, 30, positions=48, generators=generators(0, 0, 0), temperature=0, end_of_text=end)
    assert torch.equal(ours, expected)

    counted = Logits(theirs)
    generate(counted, prompts[:1], 30, positions=48, generators=generators(0), temperature=0, end_of_text=end)
    assert len(counted.lengths) <= 5


def test_the_window_slides(theirs: GPT2LMHeadModel) -> None:
    prompt = torch.randint(67, (1, 60), generator=torch.Generator().manual_seed(6))
    counted = Logits(theirs)
    ours = generate(counted, prompt, 4, positions=48, generators=generators(0), temperature=0)
    expected = prompt
    for _ in range(4):
        expected = torch.cat([expected, theirs(expected[:, -48:]).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ours, expected) and counted.lengths == [48] * 4


def test_a_row_does_not_depend_on_its_neighbours(theirs: GPT2LMHeadModel) -> None:
    prompts = torch.ones(3, 4, dtype=torch.int64)
    together = generate(Logits(theirs), prompts, 20, positions=48, generators=generators(1, 2, 3))
    alone = generate(Logits(theirs), prompts[:1], 20, positions=48, generators=generators(2))
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])


def test_padding_of_the_vocabulary_is_never_drawn(theirs: GPT2LMHeadModel) -> None:
    prompt = torch.ones(1, 4, dtype=torch.int64)
    drawn = [generate(Logits(theirs), prompt, 40, positions=48, generators=generators(7), temperature=9.0, vocab_size=size)
             for size in (67, 20)]
    assert drawn[0].max() >= 20 and drawn[1].max() < 20


def test_the_network_returns_to_its_mode_also_after_an_error(theirs: GPT2LMHeadModel) -> None:
    network = Logits(deepcopy(theirs)).train()
    modes = []
    network.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    out = generate(network, torch.ones(1, 4, dtype=torch.int64), 2, positions=48, generators=generators(0))
    assert network.training and modes == [False, False] and not out.requires_grad
    with pytest.raises(IndexError):
        generate(network, torch.full((1, 4), 999), 2, positions=48, generators=generators(0))
    assert network.training


def test_a_length_that_comes_once_gets_no_attention_plan(theirs: GPT2LMHeadModel) -> None:
    """cuDNN makes one for each; whether it may be taken is as before afterwards, also after an error."""
    seen = []
    network = Logits(deepcopy(theirs))
    network.register_forward_pre_hook(lambda _module, _args: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    generate(network, torch.ones(1, 4, dtype=torch.int64), 3, positions=48, generators=generators(0))
    assert seen == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled()
    with pytest.raises(IndexError):
        generate(network, torch.full((1, 4), 999), 2, positions=48, generators=generators(0))
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        generate(network, torch.ones(1, 4, dtype=torch.int64), 1, positions=48, generators=generators(0))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


# --- with keys and values kept ---------------------------------------------------------------------------------------------

SHAPES = {
    "gpt2": {},
    "llama": {"preset": "llama", "kv_heads": 2},
    "qwen3": {"preset": "qwen3", "head_width": 16, "kv_heads": 1},
    "window": {"preset": "llama", "window": 7},
}


@pytest.fixture(scope="module", params=SHAPES)
def ours(request: pytest.FixtureRequest) -> GPT:
    """A GPT with large weights, so that its choices vary."""
    made = GPT(GPTSettings(layers=2, heads=4, width=32, positions=24, init_std=0.4, **SHAPES[request.param]), vocab_size=67)
    made.initialise(3)
    return made.eval()


PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [33, 34, 35, 36], [1] * 20]


def alone(network: GPT, prompt: list[int], new: int, seed: int, **settings) -> list[int]:
    """What one prompt comes to by the plain definition: the whole window is read anew for each token, in plain causal order."""
    tokens, one = torch.tensor([prompt]), generators(seed)
    for _ in range(new):
        tokens = torch.cat([tokens, generate(network, tokens[:, -24:], 1, positions=24, generators=one, **settings)[:, -1:]], 1)
    return tokens[0, len(prompt):].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("new", [4, 40])
def test_the_cache_and_the_batch_change_nothing(ours: GPT, temperature: float, new: int) -> None:
    """Prompts of 1 to 20 tokens side by side, 24 positions: 4 new tokens fit, with 40 the window slides in every row."""
    expected = [alone(ours, prompt, new, seed, temperature=temperature) for seed, prompt in enumerate(PROMPTS)]
    tokens, lengths = left_padded(PROMPTS)
    drawn = generate(ours, tokens, new, positions=24, layers=2, lengths=lengths, generators=generators(0, 1, 2, 3),
                     temperature=temperature)
    assert drawn[:, tokens.shape[1]:].tolist() == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_kept_keys_and_values_are_not_computed_again(ours: GPT) -> None:
    read = []
    watch = ours.register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    generate(ours, torch.ones(2, 20, dtype=torch.int64), 8, positions=24, layers=2, generators=generators(0, 1))
    watch.remove()
    # The prompt, four tokens until the positions are full, then whole windows.
    assert read == [(2, 20), (2, 1), (2, 1), (2, 1), (2, 1), (2, 24), (2, 24), (2, 24)]


def test_logits_from_the_cache_equal_those_without(ours: GPT) -> None:
    tokens = torch.randint(67, (3, 24), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(2, 24)
    with torch.no_grad():
        plain = ours(tokens)
        parts = [ours(part, cache=cache) for part in tokens.split([5, 1, 1, 9, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), plain, rtol=1e-5, atol=1e-5)


def test_cached_greedy_equals_transformers_with_its_own_cache_and_padding() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "max_position_embeddings": 64}
    theirs = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3, rope_theta=10_000.0, rms_norm_eps=1e-5,
                                          tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    network = GPT(GPTSettings(preset="llama", layers=2, heads=4, kv_heads=2, width=32, mlp_width=128, positions=64,
                              rope_base=10_000.0), vocab_size=67)
    weights = theirs.state_dict()
    named = {"token_embedding.weight": weights["model.embed_tokens.weight"], "final_norm.weight": weights["model.norm.weight"],
             "output.weight": weights["lm_head.weight"]}
    for layer in range(2):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        named[f"{new}attention.query_key_value.weight"] = torch.cat(
            [weights[f"{old}self_attn.{part}_proj.weight"] for part in "qkv"])
        for name, other in {"attention.output": "self_attn.o_proj", "attention_norm": "input_layernorm",
                            "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
                            "mlp.down": "mlp.down_proj"}.items():
            named[f"{new}{name}.weight"] = weights[f"{old}{other}.weight"]
    network.load_state_dict(named)
    tokens, lengths = left_padded(PROMPTS)
    mask = torch.arange(20) >= 20 - torch.tensor(lengths)[:, None]
    expected = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=30, do_sample=False, eos_token_id=None)
    drawn = generate(network, tokens, 30, positions=64, layers=2, lengths=lengths, generators=generators(0, 0, 0, 0),
                     temperature=0)
    assert torch.equal(drawn, expected)


def test_tokens_come_as_they_are_drawn(ours: GPT) -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    whole = generate(ours, tokens, 6, positions=24, layers=2, generators=generators(1, 2))
    steps = stream(ours.train(), tokens, 6, positions=24, layers=2, generators=generators(1, 2))
    first = next(steps)
    assert first.tolist() == whole[:, 3].tolist() and torch.is_grad_enabled()
    steps.close()  # whoever stops listening leaves the network as it was
    assert ours.training
    ours.eval()


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    network = GPT(GPTSettings(layers=1, heads=1, width=8, positions=16), vocab_size=67)
    network.initialise(0)
    prompt = torch.ones(1, 2, dtype=torch.int64)
    expected = generate(network, prompt, 12, positions=16, layers=1, generators=generators(0))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for block in network.blocks():
        block.compile(backend=backend)
    assert torch.equal(generate(network, prompt, 12, positions=16, layers=1, generators=generators(0)), expected)
    assert not compiled
    network(prompt)
    assert compiled
