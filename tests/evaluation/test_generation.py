"""Sampling text: against transformers where it is greedy, and against its own promises where it draws."""

from __future__ import annotations

import pytest
import torch

from genscale.data.text.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from genscale.errors import UserError
from genscale.families.gpt.generation import GrowingText, sample_text, stream_texts
from genscale.families.gpt.network import GPT, GPTSettings


class Letters(ByteTokenizer):
    """The bytes up to "z", with 0 as the end of text, shown where it is decoded: a small vocabulary ends texts often."""

    vocab_size, end_of_text = 123, 0

    def decode(self, ids: list[int]) -> str:
        assert max(ids, default=0) < self.vocab_size
        return "".join(map(chr, ids))


@pytest.fixture(scope="module")
def network() -> GPT:
    """A GPT with large weights, so that its choices vary, and a padded vocabulary."""
    made = GPT(GPTSettings(layers=2, heads=2, width=32, positions=24, init_std=0.4), vocab_size=128)
    made.initialise(3)
    return made


def test_greedy_text_is_the_likeliest_letter_each_time(network: GPT) -> None:
    text = "genscale"
    with torch.no_grad():
        while len(text) < 48:  # twice the positions: the window slides
            best = int(network(torch.tensor([Letters().encode(text)[-24:]]))[0, -1, :123].argmax())
            if best == Letters.end_of_text:
                break
            text += Letters().decode([best])
    assert len(set(text[8:])) > 1
    assert sample_text(network, Letters(), "genscale", tokens=40, temperature=0, count=2) == [text, text]


def test_texts_depend_on_the_seed_and_their_number_alone(network: GPT) -> None:
    def draw(seed: int, count: int) -> list[str]:
        return sample_text(network, Letters(), "gen", tokens=20, seed=seed, count=count)

    three = draw(1, 3)
    torch.manual_seed(99)
    assert draw(1, 3) == three and draw(1, 1) == three[:1] and draw(2, 3) != three
    assert len(set(three)) == 3 and all(text.startswith("gen") for text in three)


def test_temperature_top_k_and_top_p_reach_the_draws(network: GPT) -> None:
    def draw(**settings) -> str:
        return sample_text(network, Letters(), "gen", tokens=30, seed=5, **settings)

    greedy, free = draw(temperature=0), draw(temperature=3.0)
    assert draw(temperature=3.0, top_k=1) == draw(temperature=3.0, top_p=1e-6) == greedy != free
    assert draw(temperature=1e-4) == greedy
    assert draw(temperature=3.0, top_k=128, top_p=1.0) == free


def test_an_empty_prompt_starts_a_document_and_the_end_of_text_ends_it(network: GPT) -> None:
    texts = sample_text(network, Letters(), "", tokens=300, temperature=2.0, count=8)
    # The document ends at the first end of text, which is not shown; 300 draws of about 1 in 123 end most texts.
    assert all("\0" not in text for text in texts) and min(map(len, texts)) < 300
    with torch.no_grad():
        first = network(torch.tensor([[Letters.end_of_text]]))[0, -1, :123].argmax()
    assert sample_text(network, Letters(), "", tokens=1, temperature=0) == [Letters().decode([int(first)])]


def test_a_prompt_longer_than_the_positions_counts_by_its_end(network: GPT) -> None:
    end = "thequickbrownfoxjumpsover"[-24:]
    long, short = (sample_text(network, Letters(), prompt, tokens=5, seed=6)[0] for prompt in ("zzzzz" + end, end))
    assert long == "zzzzz" + short and len(short) > 24


@pytest.mark.parametrize(("setting", "value", "allowed"), [
    ("temperature", -0.5, "0 (always the likeliest token)"), ("temperature", float("nan"), "0 ("),
    ("temperature", float("inf"), "1 ("), ("top_p", 0.0, "0.01"), ("top_p", 1.5, "1"), ("top_k", 0, "1"),
    ("tokens", 0, "1"), ("count", 0, "1"),
])
def test_settings_out_of_range_are_one_clear_line(network: GPT, setting: str, value: float, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        sample_text(network, Letters(), "gen", **{"tokens": 5, setting: value})
    message = str(caught.value)
    assert message.startswith(f"{setting}: {value} ") and f"nearest allowed value is {allowed}" in message


def test_several_prompts_write_what_each_writes_alone(network: GPT) -> None:
    """Also past the positions, and with more texts than are written side by side."""
    prompts = ["genscale", "g", "", "a prompt that is longer than the positions are"] * 10
    pieces = list(stream_texts(network, Letters(), prompts, tokens=30, temperature=1.5, seed=4, count=2))
    texts = [""] * 80
    for piece in pieces:
        texts[piece.text] += piece.words
    for prompt, first in zip(prompts[:4], (0, 2, 4, 6), strict=True):
        assert texts[first:first + 2] == sample_text(network, Letters(), prompt, tokens=30, temperature=1.5, seed=4, count=2)
    assert texts[8:] == texts[:-8] and len(set(texts[:8])) == 8
    assert [piece.text for piece in pieces] == sorted(piece.text for piece in pieces)


def test_the_first_text_comes_token_by_token_and_every_token_counts(network: GPT) -> None:
    pieces = list(stream_texts(network, Letters(), ["gen"], tokens=20, seed=5, count=3))
    assert pieces[0] == (0, "gen", 0)
    first = [piece for piece in pieces if piece.text == 0]
    assert len(first) > 10 and all(piece.tokens == 1 and len(piece.words) <= 1 for piece in first[1:])
    for text in range(3):
        drawn = sum(piece.tokens for piece in pieces if piece.text == text)
        words = "".join(piece.words for piece in pieces if piece.text == text)
        assert drawn == len(words) - len("gen") + (drawn < 20)  # the end of text is drawn and not shown


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Merges that cut characters in the middle: trained on characters of two to four bytes."""
    text = "Zoë naïve 東京 タワー 👩‍👩‍👧 😀😃 слово, слова; mañana. " * 30
    return load_tokenizer(str(train_bpe([text], 300, tmp_path_factory.mktemp("bpe"))))


def test_only_whole_characters_are_shown(bpe: Tokenizer) -> None:
    text = " Zoë 東京タワー 👩‍👩‍👧 so: 😀 слово…🂡 ends"
    for tokenizer in (ByteTokenizer(), bpe):
        growing, pieces = GrowingText(tokenizer), []
        for token in [*tokenizer.encode(text), tokenizer.end_of_text]:
            growing.add(token)
            pieces.append(growing.take())
        assert growing.ended and "".join(words for words, _ in pieces) == text
        assert sum(drawn for _, drawn in pieces) == len(pieces)
        assert all("\N{REPLACEMENT CHARACTER}" not in words for words, _ in pieces)
        assert sum(bool(words) for words, _ in pieces) > 12


def test_text_that_is_no_utf_8_is_shown_as_it_is_decoded(bpe: Tokenizer) -> None:
    draw = torch.Generator().manual_seed(0)
    for tokenizer in (ByteTokenizer(), bpe):
        for _ in range(30):
            ids = [i for i in torch.randint(tokenizer.vocab_size, (40,), generator=draw).tolist() if i != tokenizer.end_of_text]
            growing, shown = GrowingText(tokenizer), ""
            for token in ids:
                growing.add(token)
                shown += growing.take()[0]
            assert shown + growing.take(last=True)[0] == tokenizer.decode(ids)
