"""Rollouts of the family `reward`: which token a number draws, that no text depends on its neighbours, and what its
log-probability is, against a network that is given one text at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genscale.families.gpt.network import GPT, GPTSettings
from genscale.families.reward.rollout import Answers, Prompts, Writer, drawn, entropy, log_probability
from genscale.objectives.base import Rollout
from genscale.rng import Draws

VOCABULARY, END, TOKENS, GROUP = 7, 6, 5, 3


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def network(request: pytest.FixtureRequest) -> GPT:
    """Sure of little, so that texts differ, and with rows beyond the vocabulary that it thinks likely."""
    made = GPT(GPTSettings(preset=request.param, layers=2, heads=2, width=16, positions=16, init_std=0.5), 8)
    made.initialise(3)
    return made.eval()


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(2, VOCABULARY, END, TOKENS)


def padded(*prompts: list[int]) -> Tensor:
    return torch.tensor([[-1] * (6 - len(prompt)) + prompt for prompt in prompts])


PROMPTS = padded([1, 2, 3, 4], [5], [2, 2])
UNIFORMS = Draws(1, "policy", 4, torch.arange(3)).uniform("token", GROUP, TOKENS)


def alone(network: GPT, answers: Answers, number: int) -> list[int]:
    return answers.tokens[number][answers.mask[number]].tolist()


def test_a_number_draws_the_token_whose_probability_it_falls_into() -> None:
    logits = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.9, 1 - 2**-24])
    assert drawn(logits.expand(5, -1), uniforms).tolist() == [1, 1, 3, 3, 3]  # never one that has no probability
    many = drawn(logits.expand(4000, -1), Draws(0, "a", 0, torch.arange(4000)).uniform("b"))
    assert (many == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_a_text_does_not_depend_on_those_beside_it(network: GPT, writer: Writer) -> None:
    together = writer.write(Rollout(network), Prompts.of(PROMPTS), UNIFORMS.flatten(0, 1), GROUP)
    assert {len(text) for text in (alone(network, together, n) for n in range(9))} > {TOKENS}  # some end, some are cut
    for place in range(3):
        prompts = Prompts.of(PROMPTS[place : place + 1])
        assert prompts.documents is None  # nothing is padded
        one = writer.write(Rollout(network), prompts, UNIFORMS[place], GROUP)
        for member in range(GROUP):
            assert alone(network, one, member) == alone(network, together, place * GROUP + member)
    greedy = writer.write(Rollout(network), Prompts.of(PROMPTS), None)
    tokens = PROMPTS[1][5:].tolist()
    for token in alone(network, greedy, 1):
        assert network(torch.tensor([tokens]))[0, -1, :VOCABULARY].argmax() == token
        tokens.append(token)


def test_the_log_probability_is_of_exactly_the_tokens_up_to_and_with_the_end(network: GPT, writer: Writer) -> None:
    prompts = Prompts.of(PROMPTS)
    answers = writer.write(Rollout(network), prompts, UNIFORMS.flatten(0, 1), GROUP)
    assert 0 < answers.ended.sum() < 9
    logits = writer.logits(network, prompts.repeated(GROUP), answers)
    found, chosen = log_probability(logits, answers), entropy(logits, answers)
    for number in range(9):
        text, asked = alone(network, answers, number), PROMPTS[number // GROUP]
        asked = asked[asked >= 0].tolist()
        assert (text[-1] == END) == answers.ended[number] and END not in text[:-1]
        log_p = network(torch.tensor([asked + text]))[0, :, :VOCABULARY].log_softmax(-1)[len(asked) - 1 : -1]
        assert found[number].item() == pytest.approx(sum(log_p[i, token].item() for i, token in enumerate(text)), abs=1e-4)
        assert chosen[number].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-4)


def test_processes_that_generate_together_drop_what_comes_after_the_last_end(network: GPT, writer: Writer) -> None:
    asked = []

    def goes_on(wanted: bool) -> bool:
        asked.append(wanted)
        return True  # another process is not done

    uniforms = torch.full((3, TOKENS), 0.9999999)  # the last of the vocabulary: the end
    answers = writer.write(Rollout(network, goes_on, together=True), Prompts.of(PROMPTS), uniforms)
    assert asked == [False] * (TOKENS - 1) and answers.tokens.shape == (3, TOKENS)
    assert answers.mask.tolist() == [[True] + [False] * (TOKENS - 1)] * 3 and answers.ended.all()
    assert writer.write(Rollout(network), Prompts.of(PROMPTS), uniforms).tokens.shape == (3, 1)


def test_a_rehearsal_is_as_long_as_a_rollout_can_be(network: GPT, writer: Writer) -> None:
    prompts, seen = Prompts.of(PROMPTS, whole=True), []
    watch = network.register_forward_pre_hook(lambda _module, _args: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    answers = writer.write(Rollout(network), prompts, torch.full((3, TOKENS), 0.9999999), never_end=True)
    watch.remove()
    assert seen == [False] * TOKENS and torch.backends.cuda.cudnn_sdp_enabled()  # no plan for a length that comes once
    assert prompts.tokens.shape == (3, 6) and answers.mask.all() and answers.mask.shape == (3, TOKENS)
