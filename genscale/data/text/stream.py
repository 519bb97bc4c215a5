"""One source as blocks of tokens in lanes: text through the tokenizer or the token cache, or prompt/answer pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.conversations import pair_text
from genscale.data.lanes import Cursor, Sample
from genscale.data.packing import Piece, Place, cut, pack, tokenise
from genscale.data.python_texts import version_of
from genscale.data.readers import Shard, parted_shards
from genscale.data.spec import Spec
from genscale.data.text.encoded import open_encoded
from genscale.data.text.pairs import PairEncoder, unpack
from genscale.data.text.prompt_encoder import PromptEncoder
from genscale.data.text.settings import Reading, TextDataSettings
from genscale.data.text.sources import open_source
from genscale.data.text.tokenizers import Tokenizer
from genscale.data.windows import Source
from genscale.errors import UserError


class TextStream:
    """A training source in tokens.

    Args:
        reading: what to read.
        settings: the data section.
        seed: the run's seed.
        tokenizer: what makes the tokens.
        masked: whether every sample carries a mask, because pairs are among the sources.
        cache: folder of the source's token cache.

    Attributes:
        shards: what is trained on.

    Raises:
        UserError: whatever is wrong with the source or the cache.
    """

    def __init__(self, reading: Reading, settings: TextDataSettings, seed: int, tokenizer: Tokenizer, masked: bool,
                 cache: Path | None) -> None:
        self.label, self.weight, self.spec = reading.label, reading.weight, reading.spec
        self._length, self._masked, self._tokenizer = settings.sequence_length, masked, tokenizer
        if cache is not None and self.spec.pairs:
            raise UserError(f"data.cache={settings.cache}: prompt/answer pairs ({self.spec.key}={self.spec.name}) are not "
                            "cached; leave data.cache out")
        self._pairs = pair_encoder(self.spec, settings, tokenizer)
        self.shards, self._held = parted_shards(self.spec)
        self.source = open_parted(self.spec, settings, seed, self.shards, self._held, self._pairs)
        if self._pairs:
            self._pairs.check(self.source.documents())
        self.encoded = None if self._pairs else open_encoded(self.source, tokenizer, cache)

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """Endless samples of a lane, each with the cursor that continues right after it."""
        place, offset = (None, 0) if cursor is None else (cursor["place"], cursor["offset"])
        if self._pairs:
            blocks = pack(self._pairs.read(self.source, lane, place), self._length, offset)
        else:
            assert self.encoded is not None
            blocks = self.encoded.blocks(lane, place, self._length, offset)
        for block, at, token in blocks:
            yield as_sample(block, self._pairs is not None, self._masked), {"place": at, "offset": token}

    @property
    def brings_validation(self) -> bool:
        """Whether the source has files to validate on."""
        return bool(self._held)

    def held_out(self, limit: int) -> list[Sample]:
        """The first blocks of the held-out documents in canonical order, `limit` at most."""
        documents = documents_of(self._held) if self._held else self.source.held_out()
        return validation_samples(documents, self._pairs, self._tokenizer, self._length, self._masked, limit)

    def lengths(self) -> Iterator[int]:
        """Tokens of the training documents (or parts of them) in canonical order."""
        return (len(ids) for ids, _ in in_tokens(self.source.documents(), self._pairs, self._tokenizer))

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """Whole documents in tokens (of pairs: coded, without those that are left out), each with its end of text."""
        if self._pairs:
            return [ids for ids in self._pairs.encode(documents) if ids is not None]
        return self._tokenizer.encode_documents(documents, [True] * len(documents))

    def plan(self) -> dict[str, Any]:
        """What the samples of this source depend on besides the data section, as JSON."""
        versions = version_of(self.spec.locations or (self.spec.name,))
        plan = {f"source_{key}": value for key, value in (self.source.plan() | versions).items()}
        if self._pairs:
            plan["chat_template"] = self._pairs.digest
        return plan

    def close(self) -> None:
        """Write out what the cache keeps back."""
        if self.encoded:
            self.encoded.close()


def open_training_source(spec: Spec, settings: TextDataSettings, seed: int) -> Source:
    """The documents of a source to train on; where neither it nor the settings bring others to validate on, some are held out.
    Raises UserError."""
    return open_parted(spec, settings, seed, *parted_shards(spec))


def open_parted(spec: Spec, settings: TextDataSettings, seed: int, training: list[Shard], held: list[Shard],
                pairs: PairEncoder | PromptEncoder | None = None) -> Source:
    """The same of shards that were found; `pairs` says which documents are left out."""
    fraction = 0.0 if held or settings.validation_source is not None else settings.validation_fraction
    return open_source(spec, fraction=fraction, window=settings.shuffle_window, seed=seed, lanes=settings.lanes,
                       alone=settings.sources is None, shards=training, **({"refuse": pairs.refuse} if pairs else {}))


def documents_of(shards: Iterable[Shard]) -> Iterator[str]:
    """The documents of shards, one after the other."""
    return (text for shard in shards for _, text, _ in shard.rows())


def pair_encoder(spec: Spec, settings: TextDataSettings, tokenizer: Tokenizer) -> PairEncoder | None:
    """The encoder of a source of pairs; None for a source of text."""
    return PairEncoder(tokenizer, spec, settings.separate_documents) if spec.pairs else None


def plain_documents(spec: Spec, documents: Iterable[str]) -> Iterator[str]:
    """The documents as text to learn a vocabulary from."""
    return map(pair_text, documents) if spec.pairs else iter(documents)


def in_tokens(documents: Iterable[str], pairs: PairEncoder | None, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, Place]]:
    """Documents once, tokenised: ids of pieces of text, or coded pairs."""
    return pairs.documents(documents) if pairs else tokenise(_pieces(documents), tokenizer)


def validation_samples(documents: Iterable[str], pairs: PairEncoder | None, tokenizer: Tokenizer, length: int, masked: bool,
                       limit: int) -> list[Sample]:
    """Documents packed end to end, `limit` blocks at most; the last one is filled up with -1."""
    blocks = pack(in_tokens(documents, pairs, tokenizer), length, tail=True)
    return [as_sample(block, pairs is not None, masked) for block, _, _ in islice(blocks, limit)]


def as_sample(block: np.ndarray, coded: bool, masked: bool) -> Sample:
    """A block of coded pairs or of ids as a sample; among pairs, all of a text is to be learnt."""
    if coded:
        return unpack(block)
    return {"tokens": block, "mask": (block >= 0).astype(np.uint8)} if masked else {"tokens": block}


def _pieces(documents: Iterable[str]) -> Iterator[Piece]:
    for text in documents:
        parts = cut(text)
        for number, part in enumerate(parts):
            yield Piece(part, number == len(parts) - 1, {}, number == 0)
