"""The language-model objective against closed forms, and its checks of a run's settings."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genscale.data.text.data import TextDataSettings
from genscale.data.text.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from genscale.errors import UserError
from genscale.families import family
from genscale.families.gpt.network import GPTSettings
from genscale.families.gpt.objective import PREVIEW_TOKENS, LanguageModel, build, restore
from genscale.rng import Draws
from genscale.settings.config import Config, RunSettings

MODEL = GPTSettings(layers=2, heads=2, width=16, positions=32)
DRAWS = Draws(0, "language_model", 0, torch.arange(4))


class Strict(ByteTokenizer):
    """Bytes; decoding an id that is none is an error rather than nothing."""

    def decode(self, ids: list[int]) -> str:
        assert all(0 <= i < self.vocab_size for i in ids)
        return super().decode(ids)


class WithoutBytes(ByteTokenizer):
    """A tokenizer that cannot say how long its tokens are."""

    def token_bytes(self) -> None:
        return None


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE whose tokens stand for one to several bytes."""
    return load_tokenizer(str(train_bpe(["the theme of the thesis, then others"] * 3, 270, tmp_path_factory.mktemp("bpe"))))


def make(tokenizer: Tokenizer | None = None, *, seed: int = 1, sequence_length: int = 8, data: dict | None = None,
         **model) -> LanguageModel:
    """What the family builds for these settings."""
    config = Config(run=RunSettings(seed=seed), model=GPTSettings(**{**vars(MODEL), **model}),
                    data=TextDataSettings(sequence_length=sequence_length, tokenizer="bytes", **(data or {})))
    return filled(build(config, SimpleNamespace(tokenizer=tokenizer or ByteTokenizer())))


def filled(objective: LanguageModel) -> LanguageModel:
    """The objective with its network off the meta device, holding its initial weights."""
    (network,) = objective.networks.values()
    network.to_empty(device="cpu")
    read = objective.initial_weights("gpt")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(read(name))
    return objective


def batch() -> dict[str, torch.Tensor]:
    """Four samples of nine tokens, the last two of the second and all but one of the fourth being padding."""
    tokens = torch.randint(257, (4, 9), generator=torch.Generator().manual_seed(0))
    tokens[1, 7:] = -1
    tokens[3, 1:] = -1
    return {"tokens": tokens}


def nats_by_hand(objective: LanguageModel, tokens: torch.Tensor) -> list[float]:
    """Minus the log-probability of each target in float64, one sample at a time, padding cut off rather than masked."""
    found = []
    for row in tokens:
        text = row[row >= 0]
        if len(text) > 1:
            logits = objective.networks["gpt"](text[None, :-1]).detach().double()[0]
            chosen = logits.exp()[torch.arange(len(text) - 1), text[1:]]
            found += (logits.exp().sum(-1) / chosen).log().tolist()
    return found


def test_loss_is_the_sum_of_nats_over_valid_targets() -> None:
    objective, tokens = make(), batch()["tokens"]
    (phase,) = objective.phases
    assert (phase.name, phase.network, list(objective.networks)) == ("language_model", "gpt", ["gpt"])
    expected = nats_by_hand(objective, tokens)
    terms = phase.loss(objective.networks, {"tokens": tokens}, DRAWS)
    assert torch.equal(phase.loss(objective.networks, {"tokens": tokens.int()}, DRAWS)["loss"], terms["loss"])
    assert list(terms) == ["loss"] and terms["loss"].item() == pytest.approx(math.fsum(expected), rel=1e-6)
    count = phase.count({"tokens": tokens})
    assert count == len(expected) == 8 + 6 + 8 and type(count) is int
    assert (objective.unit, objective.units_per_sample) == ("tokens", 8)


def test_only_what_the_mask_says_is_a_target() -> None:
    objective, tokens = make(), batch()["tokens"]
    mask = torch.zeros_like(tokens)
    mask[:, [2, 5, 8]] = 1
    expected = 0.0
    for row, hidden in zip(tokens, mask == 0, strict=True):
        length = int((row >= 0).sum())
        if length > 1:
            logits = objective.networks["gpt"](row[None, :length - 1]).detach().double()[0]
            nats = -logits.log_softmax(-1)[torch.arange(length - 1), row[1:length]]
            expected += nats[~hidden[1:length]].sum().item()
    masked = {"tokens": tokens, "mask": mask.to(torch.uint8)}
    assert objective.loss(objective.networks, masked, DRAWS)["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert objective.count(masked) == 3 + 2 + 3


@pytest.mark.parametrize("preset", ["gpt2", "llama"])
def test_separate_documents_are_as_if_each_stood_alone(preset: str) -> None:
    end = ByteTokenizer.end_of_text
    rows = [[5, 6, end, 7, 8, 9, end, 1, 2], [end, 3, 4, 5, 6, end, end, 8, 9]]
    objective = make(data={"separate_documents": True}, preset=preset, init_std=0.3)
    packed = objective.loss(objective.networks, {"tokens": torch.tensor(rows)}, DRAWS)["loss"].item()
    alone = 0.0
    for row in rows:
        starts = sorted({0, *(i for i, token in enumerate(row[:-1]) if token == end)})
        for start, stop in zip(starts, [*starts[1:], len(row) - 1], strict=True):
            alone += sum(nats_by_hand(objective, torch.tensor([row[start:stop + 1]])))
    assert packed == pytest.approx(alone, rel=1e-5)
    together = make(preset=preset, init_std=0.3).loss(objective.networks, {"tokens": torch.tensor(rows)}, DRAWS)["loss"].item()
    assert together != pytest.approx(alone, rel=1e-3)


def test_dropout_is_drawn_by_sample_and_in_training_only() -> None:
    objective, tokens = make(dropout=0.3, init_std=0.3), torch.randint(257, (4, 9), generator=torch.Generator().manual_seed(0))
    networks = objective.networks
    draws = [Draws(0, "language_model", 1, samples) for samples in (torch.arange(4), torch.arange(2), torch.arange(2, 4))]
    whole, *halves = [objective.loss(networks, {"tokens": part}, draw)["loss"].item()
                      for part, draw in zip((tokens, tokens[:2], tokens[2:]), draws, strict=True)]
    assert sum(halves) == pytest.approx(whole, rel=1e-5)
    plain = objective.evaluate(networks, {"tokens": tokens})["nats"].item()
    assert plain != pytest.approx(whole, rel=1e-4) and plain == objective.evaluate(networks, {"tokens": tokens})["nats"].item()


def test_micro_batches_add_up_to_the_batch() -> None:
    objective, whole = make(), batch()
    loss = objective.phases[0].loss
    total = loss(objective.networks, whole, DRAWS)["loss"]
    parts = [loss(objective.networks, {"tokens": part}, DRAWS)["loss"] for part in whole["tokens"].split([1, 3])]
    assert sum(parts).item() == pytest.approx(total.item(), rel=1e-6)


def test_padding_gets_no_gradient_and_changes_none() -> None:
    objective, padded = make(), batch()
    network = objective.networks["gpt"]
    gradients = []
    for tokens in (padded["tokens"], torch.cat([padded["tokens"], torch.full((4, 3), -1)], dim=1)):
        network.zero_grad()
        objective.loss(objective.networks, {"tokens": tokens}, DRAWS)["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_loss_is_computed_in_fp32_from_low_precision_logits() -> None:
    # As under DeepSpeed and FSDP2, which cast the network itself, so that no autocast lifts the loss back to fp32.
    objective, tokens = make(), batch()["tokens"][[0, 2]]
    networks = {"gpt": objective.networks["gpt"].bfloat16()}
    logits = networks["gpt"](tokens[:, :-1])
    loss = objective.loss(networks, {"tokens": tokens}, DRAWS)["loss"]
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    by_hand = -logits.double().log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum().item()
    # A sum in bf16 would be off by as much as 2e-3.
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_evaluate_and_summarise(bpe: Tokenizer) -> None:
    objective, text = make(bpe, sequence_length=31), "then the theme of others"
    ids = [bpe.end_of_text, *bpe.encode(text), bpe.end_of_text]
    tokens = torch.tensor([ids + [-1] * 3])
    assert len(ids) < len(text)  # so that bytes are not tokens
    with torch.no_grad():
        sums = objective.evaluate(objective.networks, {"tokens": tokens})
    assert all(value.dtype == torch.float64 and value.shape == () for value in sums.values())
    totals = {name: value.item() for name, value in sums.items()}
    expected = nats_by_hand(objective, tokens)
    assert totals["tokens"] == len(ids) - 1 == len(expected) and totals["bytes"] == len(text)

    metrics = objective.summarise(totals)
    loss = math.fsum(expected) / len(expected)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    # Bits a byte by another road: the base-2 logarithm of the text's probability, for each byte of it.
    assert metrics["bits_per_byte"] == pytest.approx(sum(math.log2(math.exp(n)) for n in expected) / len(text), rel=1e-6)


def test_a_tokenizer_without_byte_lengths_gives_no_bits_per_byte() -> None:
    objective = make(WithoutBytes())
    sums = objective.evaluate(objective.networks, batch())
    assert set(sums) == {"nats", "tokens"}
    assert set(objective.summarise({"nats": 2.0, "tokens": 1.0})) == {"loss", "perplexity"}


def test_a_diverged_model_has_infinite_perplexity() -> None:
    assert make().summarise({"nats": 5000.0, "tokens": 1.0, "bytes": 1.0})["perplexity"] == math.inf


def test_preview_is_text_that_depends_on_the_seed_alone() -> None:
    # 63 of the 320 rows of the embedding are padding; drawing one would be an error here.
    objective = make(Strict(), init_std=0.5)
    texts = [objective.preview(objective.networks, seed, torch.device("cpu")) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and all(100 < len(text) <= 200 for text in texts)


def test_preview_runs_as_many_forwards_whatever_is_drawn() -> None:
    objective = make(init_std=0.5)
    for seed in (1, 2):
        seen = []
        handle = objective.networks["gpt"].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape))
        objective.preview(objective.networks, seed, torch.device("cpu"))
        handle.remove()
        assert len(seen) == PREVIEW_TOKENS  # ranks that ran fewer would hang the others


def test_initial_weights_depend_on_the_runs_seed_alone() -> None:
    first = make(seed=3).networks["gpt"].state_dict()
    torch.manual_seed(99)
    again, other = make(seed=3).networks["gpt"].state_dict(), make(seed=4).networks["gpt"].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_vocabulary_is_the_tokenizers_rounded_up_unless_given() -> None:
    assert make().networks["gpt"].vocab_size == 320
    assert make(vocab_size=257).networks["gpt"].vocab_size == 257
    exact = ByteTokenizer()
    exact.vocab_size = 320
    assert make(exact).networks["gpt"].vocab_size == 320


@pytest.mark.parametrize(("settings", "parts"), [
    ({"sequence_length": 33}, ["data.sequence_length: 33", "model.positions 32", "at least 33"]),
    ({"vocab_size": 256}, ["model.vocab_size: 256", "257 tokens of data.tokenizer bytes", "nearest allowed value is 257"]),
    ({"heads": 3}, ["model.heads: 3", "model.width 16", "model.heads 2 or 4"]),
])
def test_wrong_settings_are_one_clear_line(settings: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(**settings)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_sequence_as_long_as_the_positions_is_allowed() -> None:
    objective = make(sequence_length=32)
    assert objective.count({"tokens": torch.zeros(2, 33, dtype=torch.int64)}) == 64
    assert objective.loss(objective.networks, {"tokens": torch.zeros(2, 33, dtype=torch.int64)}, DRAWS)["loss"] > 0


def test_a_run_keeps_its_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    make(bpe).save_assets(tmp_path)
    config = Config(model=MODEL, data=TextDataSettings(sequence_length=8, tokenizer="a file that is gone"))
    restored = restore(config, tmp_path)
    text = "then the theme of others"
    assert restored.tokenizer.encode(text) == bpe.encode(text) and restored.networks["gpt"].vocab_size == 320
    config = restored.use_assets(config, tmp_path)
    assert load_tokenizer(config.data.tokenizer).digest == bpe.digest


def test_the_family_is_registered() -> None:
    gpt = family("gpt")
    assert (gpt.model_settings, gpt.data_settings) == (GPTSettings, TextDataSettings)
    module = gpt.module()
    assert (module.build, module.restore) == (build, restore)
