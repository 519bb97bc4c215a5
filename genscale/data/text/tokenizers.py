"""Tokenizers: bytes, or any `tokenizer.json` of the `tokenizers` library with what stands beside it in its folder."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from genscale.data.text.byte_level import byte_alphabet, byte_lengths
from genscale.data.text.tokenizer_companions import Companions, read_companions
from genscale.data.text.tokenizer_faults import PROBES, check_content, quiet, reported, without_prefix
from genscale.errors import UserError
from genscale.reading import Unreadable, read_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>")
"""Names under which published tokenizers keep their end-of-text token, in the order they are looked for."""
SMALLEST_VOCABULARY = 257
"""A byte-level vocabulary holds every byte and the end of text, so that no text is out of vocabulary."""
ALONE = Companions()


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids (the largest id + 1).
        end_of_text: id of the token that ends every document.
        end_text: the text of that token; empty where no text spells it.
        digest: SHA-256 of the canonical tokenizer file, or "bytes": equal digests mean equal ids for every text.
        name: where it came from, for messages.
        companions: what the files beside it say.
        special_texts: texts of its special tokens.
        continued: the tokenizer for a text that goes on in the middle of a document: this one, unless it writes a space of its
            own before every text.
    """

    vocab_size: int
    end_of_text: int
    end_text: str = ""
    digest: str
    name: str = "bytes"
    companions: Companions = ALONE
    special_texts: Sequence[str] = ()

    @property
    def continued(self) -> Tokenizer:
        return self

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; text that spells a special token is text."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str], ends: Sequence[bool]) -> list[np.ndarray]:
        """Ids of each text, int32 `(time,)`, followed by the end of text where `ends` says so."""

    def encode_chats(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """(ids, first character and stop of each) of texts in which special tokens are spelled out, as chat templates write
        them."""
        raise NotImplementedError(f"{self.name} has no chat template")

    def texts_of(self, ids: Iterable[int]) -> list[str]:
        """The texts of tokens, as the vocabulary has them."""
        return []

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens; bytes that are not UTF-8 become the replacement character."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes each id stands for, int64 `(vocab,)`, special tokens 0; None where that is not known exactly."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write to `path` (a .json file, or a folder for `tokenizer.json`) so that `load_tokenizer` reads it back."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are the ids 0 to 255; 256 is the end of text."""

    vocab_size = SMALLEST_VOCABULARY
    end_of_text = 256
    digest = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_documents(self, texts: Sequence[str], ends: Sequence[bool]) -> list[np.ndarray]:
        documents = []
        for text, end in zip(texts, ends, strict=True):
            raw = np.frombuffer(text.encode(), np.uint8)
            ids = np.full(len(raw) + end, self.end_of_text, np.int32)
            ids[: len(raw)] = raw
            documents.append(ids)
        return documents

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int64)

    def save(self, path: str | Path) -> Path:
        return _write(path, json.dumps({"model": {"type": "bytes"}}))


class KnownVocabulary(ByteTokenizer):
    """Of a vocabulary nothing but its size is known, which is enough to plan a run with."""

    digest, name = "unknown", "a tokenizer that is not here"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1

    def token_bytes(self) -> np.ndarray | None:  # type: ignore[override]
        return None


class FileTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        text: content of its `tokenizer.json`.
        name: where it came from, for messages.
        companions: what the files beside it say.

    Raises:
        UserError: the content is damaged or names no end-of-text token.
    """

    def __init__(self, text: str, name: str, companions: Companions = ALONE) -> None:
        import tokenizers

        self.name, self.companions = name, companions

        advice = "make one with `genscale tokenizer train`, or set data.tokenizer=bytes"
        with quiet(), reported(f"data.tokenizer={name}: not a tokenizer.json of the tokenizers library, or damaged", advice):
            self._backend = tokenizers.Tokenizer.from_str(text)
            self._content = json.loads(text)
        self._backend.no_padding()
        self._backend.no_truncation()
        # A document that happens to spell a special token must not end there.
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        largest = check_content(self._content, vocabulary, name)
        self.vocab_size = largest + 1
        self.special_texts = [token["content"] for token in self._content.get("added_tokens", []) if token["special"]]
        self.end_of_text = _end_of_text(vocabulary, companions, name)
        self.end_text = cast(str, self._backend.id_to_token(self.end_of_text))  # an id of the vocabulary
        # Sorted keys and no spaces: reformatting the file does not make it another tokenizer.
        self._canonical = json.dumps(self._content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        # Where another file names the end of text, it belongs to the tokenizer.
        self._ends_elsewhere = not _named_ends(vocabulary)
        named = f" ends with {self.end_of_text}" if self._ends_elsewhere else ""
        self.digest = hashlib.sha256(f"{self._canonical}{named}".encode()).hexdigest()
        with quiet():  # a pattern that fails on such texts ends the run now
            self.encode_batch(PROBES)

    @cached_property
    def continued(self) -> Tokenizer:
        text = json.dumps({**self._content, "normalizer": without_prefix(self._content.get("normalizer")),
                           "pre_tokenizer": without_prefix(self._content.get("pre_tokenizer"))})
        return self if json.loads(text) == self._content else FileTokenizer(text, self.name, self.companions)

    def _working(self) -> AbstractContextManager[None]:
        return reported(f"data.tokenizer={self.name}: fails on a text", "mend its patterns, or give another tokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with self._working():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, texts: Sequence[str], ends: Sequence[bool]) -> list[np.ndarray]:
        documents = self.encode_batch(texts)
        for ids, end in zip(documents, ends, strict=True):
            if end:
                ids.append(self.end_of_text)
        return [np.array(ids, np.int32) for ids in documents]

    @cached_property
    def _chat_backend(self) -> Any:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._canonical)
        backend.no_padding()
        backend.no_truncation()
        return backend

    def encode_chats(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        with self._working():
            encodings = self._chat_backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def texts_of(self, ids: Iterable[int]) -> list[str]:
        return [text for i in ids if (text := self._backend.id_to_token(i))]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def _bytes(self) -> np.ndarray | None:
        return byte_lengths(self._content, self._backend.get_vocab(with_added_tokens=False), self.vocab_size)

    def token_bytes(self) -> np.ndarray | None:
        return self._bytes

    def save(self, path: str | Path) -> Path:
        path = _write(path, self._canonical)
        companions = self.companions
        if self._ends_elsewhere:
            companions = replace(companions, special_tokens={**companions.special_tokens, "eos_token": self.end_text})
        companions.save(path.parent)
        return path


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[tuple[str, bool, bool]]) -> list[np.ndarray]:
    """Ids of pieces of documents, int32 `(time,)`.

    Args:
        pieces: (text, whether the document begins with it, whether it ends with it: the end of text follows).
    """
    if tokenizer.continued is tokenizer or all(begins for _, begins, _ in pieces):
        return tokenizer.encode_documents([text for text, _, _ in pieces], [ends for _, _, ends in pieces])
    found: dict[int, np.ndarray] = {}
    for chosen, wanted in ((tokenizer, True), (tokenizer.continued, False)):
        own = [number for number, (_, begins, _) in enumerate(pieces) if begins == wanted]
        ids = chosen.encode_documents([pieces[number][0] for number in own], [pieces[number][2] for number in own])
        found.update(zip(own, ids, strict=True))
    return [found[number] for number in range(len(pieces))]


def _named_ends(vocabulary: dict[str, int]) -> list[int]:
    return [vocabulary[word] for word in END_OF_TEXT_NAMES if word in vocabulary]


def _end_of_text(vocabulary: dict[str, int], companions: Companions, name: str) -> int:
    """The token that ends a document: by its published names first, for the `eos_token` of a chat model ends a mere turn."""
    eos = companions.special_tokens.get("eos_token")
    found = [*_named_ends(vocabulary), *([vocabulary[eos]] if eos in vocabulary else []),
             *(number for number in companions.end_ids if number in set(vocabulary.values()))]
    if not found:
        raise UserError(f"data.tokenizer={name}: has no end-of-text token; add one named {END_OF_TEXT}, or name it as "
                        "eos_token in a tokenizer_config.json beside it")
    return found[0]


def _write(path: str | Path, text: str) -> Path:
    path = Path(path)
    path = path if path.suffix == ".json" else path / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", or the path of a `tokenizer.json` or of a folder that holds one.

    Raises:
        UserError: no such file, a damaged one, or one without an end-of-text token.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"data.tokenizer={name}: there is no file {path}; give the path of a tokenizer.json, or "
                        "set data.tokenizer=bytes") from None
    except (OSError, Unreadable) as error:
        raise UserError(f"data.tokenizer={name}: cannot be read ({error}); give the path of a tokenizer.json, or "
                        "set data.tokenizer=bytes") from None
    if text == json.dumps({"model": {"type": "bytes"}}):
        return ByteTokenizer()
    return FileTokenizer(text, name, read_companions(path.parent, name))


def train_bpe(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and write it; the same texts give the same file.

    Args:
        texts: the documents to learn the merges from.
        vocab_size: most ids, the 256 bytes and the end of text included; little text may give fewer.
        out: a .json file, or a folder for `tokenizer.json`.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size}: a byte-level vocabulary holds 256 bytes and the end of text; "
                        f"at least {SMALLEST_VOCABULARY}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # The alphabet is sorted: the library numbers it in the order given, and `alphabet()` comes in another order each time.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=sorted(byte_alphabet()))
    backend.train_from_iterator(texts, trainer)
    content = json.loads(backend.to_str())
    return _write(out, json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
