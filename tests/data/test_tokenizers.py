"""Tokenizers against the text itself and against the `tokenizers` library used directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genscale.data.text.data import TextDataSettings, train_tokenizer
from genscale.data.text.tokenizers import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from genscale.errors import UserError

TEXTS = ["Hello, world!", "  two  spaces\n\n\ttab", "naïve café — 東京 🎉", f"spelled {END_OF_TEXT} out", ""]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(TextDataSettings(), 600, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe_path: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe_path))


def test_round_trip_and_byte_counts(tokenizer: Tokenizer) -> None:
    counts = tokenizer.token_bytes()
    assert counts is not None and counts.shape == (tokenizer.vocab_size,) and counts.dtype == np.int64
    assert counts[tokenizer.end_of_text] == 0
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert counts[ids].sum() == len(text.encode())
        assert tokenizer.end_of_text not in ids, "a document that spells the special token must not end there"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end_of_text]) == "a"


def test_documents_end_with_end_of_text(tokenizer: Tokenizer) -> None:
    for ids, text, end in zip(tokenizer.encode_documents(TEXTS, [True, False] * 2 + [True]), TEXTS, [True, False] * 2 + [True],
                              strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text) + [tokenizer.end_of_text] * end


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(str(tokenizer.save(tmp_path)))
    assert again.digest == tokenizer.digest and again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert load_tokenizer(str(tmp_path)).digest == tokenizer.digest  # the folder does as well


def test_bpe_equals_the_library_and_training_is_deterministic(bpe_path: Path, tmp_path: Path) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(bpe_path))
    ours = load_tokenizer(str(bpe_path))
    assert ours.vocab_size == library.get_vocab_size() == 600
    assert ours.encode_batch(TEXTS[:3]) == [library.encode(text, add_special_tokens=False).ids for text in TEXTS[:3]]
    assert train_tokenizer(TextDataSettings(), 600, tmp_path / "again.json").read_bytes() == bpe_path.read_bytes()


def test_digest_ignores_the_layout_of_the_file(bpe_path: Path, tmp_path: Path) -> None:
    content = json.loads(bpe_path.read_text())
    (tmp_path / "indented.json").write_text(json.dumps(content, indent=4))
    assert load_tokenizer(str(tmp_path / "indented.json")).digest == load_tokenizer(str(bpe_path)).digest
    other = train_bpe(["quite another text, quite another tokenizer"], 300, tmp_path / "other.json")
    assert load_tokenizer(str(other)).digest != load_tokenizer(str(bpe_path)).digest


def test_training_leaves_the_held_out_documents_alone(tmp_path: Path) -> None:
    words = [f"{a}{b}qq" for a in "abcdefgh" for b in "vwxyz"]  # each occurs in one document only
    texts = [f"document {word} " + f"{word} " * 50 for word in words]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    settings = TextDataSettings(source=str(tmp_path / "a.txt"), document="line", validation_fraction=0.25, lanes=4)
    vocabulary = json.loads(train_tokenizer(settings, 1000, tmp_path).read_text())["model"]["vocab"]
    assert sum(f"Ġ{word}" in vocabulary for word in words) == 30


def test_token_bytes_are_not_guessed(tmp_path: Path) -> None:
    path = train_bpe(["some text to learn from " * 5], 270, tmp_path)
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(content))
    assert load_tokenizer(str(path)).token_bytes() is None


@pytest.mark.parametrize(("name", "content", "words"), [
    ("missing.json", None, ["no file", "bytes"]),
    ("damaged.json", '{"model": {"type": "BPE"', ["damaged"]),
    ("other.json", '{"hello": 1}', ["damaged"]),
    ("noend.json", '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]},"added_tokens":[]}', ["end-of-text"]),
])
def test_bad_files_are_one_clear_line(tmp_path: Path, name: str, content: str | None, words: list[str]) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path / name))
    assert str(caught.value).startswith(f"data.tokenizer={tmp_path / name}: ") and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="256.*257"):
        train_tokenizer(TextDataSettings(), 256, tmp_path)


def hf_folder(path: Path, special: list[str], **files: dict) -> Path:
    """A Hugging Face folder: a BPE whose own end of text is removed, other special tokens, and files beside it."""
    from tokenizers import AddedToken, Tokenizer

    content = json.loads(train_bpe(["some text to learn from " * 5], 270, path).read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["<unused>"] = content["model"]["vocab"].pop(END_OF_TEXT)
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


@pytest.mark.parametrize(("special", "files", "end"), [
    # SmolLM2, Qwen: the chat model's eos_token ends a turn, not a document.
    (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|endoftext|>"),
    (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], {"tokenizer_config": {"eos_token": "<|eot_id|>"}},
     "<|end_of_text|>"),  # Llama 3
    (["<s>", "</s>"], {}, "</s>"),  # Llama 2, Mistral
    (["[BEGIN]", "[DONE]"], {"tokenizer_config": {"eos_token": "[DONE]", "bos_token": None}}, "[DONE]"),
    (["[BEGIN]", "[DONE]"], {"tokenizer_config": {"eos_token": {"content": "[DONE]", "lstrip": False}}}, "[DONE]"),
    (["[BEGIN]", "[DONE]"], {"generation_config": {"eos_token_id": [271, 270]}}, "[DONE]"),
])
def test_the_end_of_text_of_published_tokenizers_is_found(tmp_path: Path, special: list[str], files: dict, end: str) -> None:
    tokenizer = load_tokenizer(str(hf_folder(tmp_path / "hf", special, **files)))
    assert tokenizer._backend.id_to_token(tokenizer.end_of_text) == end
    assert tokenizer.encode_documents(["text"], [True])[0][-1] == tokenizer.end_of_text
    # The run keeps it, wherever it was named.
    kept = load_tokenizer(str(tokenizer.save(tmp_path / "run" / "tokenizer.json")))
    assert (kept.end_of_text, kept.digest) == (tokenizer.end_of_text, tokenizer.digest)


def test_the_end_of_text_belongs_to_the_digest(tmp_path: Path) -> None:
    digests = {load_tokenizer(str(hf_folder(tmp_path / end, ["[A]", "[B]"], tokenizer_config={"eos_token": end}))).digest
               for end in ("[A]", "[B]")}
    assert len(digests) == 2


def test_damaged_files_beside_a_tokenizer_are_one_clear_line(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, ["</s>"])
    for text, word in [("{", "damaged"), ("[]", "holds no settings")]:
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(UserError, match=f"data.tokenizer={folder}: .*tokenizer_config.json.*{word}"):
            load_tokenizer(str(folder))


def test_progress_and_limit_of_the_text(tmp_path: Path) -> None:
    texts = [f"document {i} " + "é" * 1000 for i in range(3000)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    settings, told = TextDataSettings(source=str(tmp_path / "a.txt"), document="line", lanes=4, validation_fraction=0.001), []
    train_tokenizer(settings, 300, tmp_path / "all.json", lambda *call: told.append(call))
    documents, size, done = told[-1]
    training = len(told) - 1
    assert done and documents == training and 2990 <= training < 3000
    assert size == sum(len(text.encode()) for text in texts) - held_out_size(settings)
    told.clear()
    train_tokenizer(settings, 300, tmp_path / "some.json", lambda *call: told.append(call), megabytes=1)
    assert told[-1][2] and 10**6 <= told[-1][1] < 10**6 + 3000 and told[-1][0] == len(told) - 1


def held_out_size(settings: TextDataSettings) -> int:
    from genscale.data.text.settings import readings
    from genscale.data.text.stream import open_training_source

    return sum(len(text.encode()) for text in open_training_source(readings(settings)[0].spec, settings, 0).held_out())


def test_progress_in_a_log_is_plain_lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from genscale.data.text import vocabulary as vocabulary_text

    monkeypatch.setattr(vocabulary_text, "SECONDS", 0.0)
    texts = vocabulary_text.reported(iter(["é" * 500_000] * 3), vocabulary_text.console_progress(), None)
    assert len(list(texts)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines[:3]] == [f"read {i}.0 MB in {i} documents" for i in (1, 2, 3)]
    assert lines[-1].startswith("read 3.0 MB in 3 documents") and lines[-1].endswith("learning the vocabulary")


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace", "ByteLevel"])
def test_a_cut_of_a_long_document_adds_no_space(tmp_path: Path, kind: str) -> None:
    """Llama 2's tokenizer and its like write a space before every text: not where a document goes on."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    from genscale.data.packing import Piece, cut, tokenise

    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel() if kind == "ByteLevel" else pre_tokenizers.Metaspace()
    text = "\n".join(["the assistant says what the user says"] * 3 + ["x" * 30]) * 200
    backend.train_from_iterator([text[:2000]], trainers.BpeTrainer(vocab_size=120, special_tokens=["</s>", "<unk>"],
                                                                   show_progress=False))
    if kind == "Prepend":  # the same words as Metaspace has
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        backend.decoder = decoders.Replace("▁", " ")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    parts = cut(text)
    assert len(parts) > 1 and tokenizer.continued.continued is tokenizer.continued
    pieces = [Piece(part, number == len(parts) - 1, {}, number == 0) for number, part in enumerate(parts)]
    ids = np.concatenate([ids for ids, _ in tokenise(pieces, tokenizer)])
    assert ids.tolist() == [*backend.encode(text, add_special_tokens=False).ids, tokenizer.end_of_text]
