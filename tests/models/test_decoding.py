"""Decoding against transformers: its logit filters, its greedy search, and the window that slides."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

from genscale.models.decoding import choose, filter_logits, generate


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
