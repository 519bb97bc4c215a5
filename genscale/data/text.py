"""Text as training data: documents, tokenised on the fly, packed end to end into blocks, in canonical lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.packing import Piece, cut, pack, tokenise
from genscale.data.readers import Spec, find_shards
from genscale.data.sources import Source, no_text, open_source
from genscale.data.tokenizers import load_tokenizer, train_bpe
from genscale.errors import UserError


@dataclass
class TextDataSettings:
    """Text to train on."""

    source: str = "python-docs"
    """python-docs (CPython's language reference, no download), a local file or folder of .txt, .jsonl or .parquet (plain or
    compressed: .gz .zst .xz .bz2), or the name of a Hugging Face hub dataset."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    column: str = "text"
    """Column that holds the text."""
    document: Literal["paragraph", "line", "file"] = "paragraph"
    """What one document of a .txt file is."""
    validation_source: str | None = None
    """Source of the validation set (of a hub dataset, its split "validation"). Default: held-out documents of the source."""
    validation_fraction: OpenUnitInterval = 0.05
    """Share of the source's documents held out for validation when there is no validation source."""
    validation_blocks: PositiveInt = 64
    """At most so many blocks of the validation set are used."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or of a folder that holds one."""
    sequence_length: PositiveInt = 256
    """Tokens a sample predicts."""
    separate_documents: bool = False
    """A token sees only its own document, and positions count from the document's start (default: the whole block)."""
    lanes: PositiveInt = 48
    """Parallel streams that make up the sample order, whatever the number of processes; reading is cheapest where it is a
    multiple of processes x workers."""
    shuffle_window: PositiveInt = 256
    """Documents shuffled together in a lane when the source is too large for memory; a smaller one is shuffled as a whole."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""


class TextData(Data):
    """Samples `{"tokens": int32 (sequence_length + 1,)}`; each block starts at the last token of the one before it in its lane.

    Validation samples come from the held-out documents in canonical order; the last one is filled up with -1.

    Raises:
        UserError: whatever is wrong with source, column, tokenizer or validation set.
    """

    def __init__(self, settings: TextDataSettings, seed: int) -> None:
        self.settings, self.seed, self.lane_count = settings, seed, settings.lanes
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self._source = _training_source(settings, seed)
        self._validation = self._read_validation()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validation": []}  # worker processes only read lanes

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        place, offset = (None, 0) if cursor is None else (cursor["place"], cursor["offset"])
        pieces = tokenise(self._source.read(lane, place), self.tokenizer)
        for block, at, token in pack(pieces, self.settings.sequence_length, offset):
            yield {"tokens": block}, {"place": at, "offset": token}

    def validation(self) -> list[Sample]:
        return self._validation

    def _read_validation(self) -> list[Sample]:
        settings = self.settings
        if settings.validation_source is None:
            spec = _spec(settings)
            documents = self._source.held_out()
        else:
            spec = Spec("data.validation_source", settings.validation_source, settings.subset, "validation", settings.column,
                        settings.document)
            documents = (text for shard in find_shards(spec, at_least=1) for _, text in shard.rows())
        blocks = pack(tokenise(_pieces(documents), self.tokenizer), settings.sequence_length, tail=True)
        samples = [{"tokens": block} for block, _, _ in islice(blocks, settings.validation_blocks)]
        if samples:
            return samples
        if settings.validation_source is not None:
            raise no_text(spec)
        raise UserError(f"data.validation_fraction={settings.validation_fraction}: no document of "
                        f"data.source={settings.source} falls into the validation set; set a larger share, or "
                        f"data.validation_source")

    def check(self, global_batch_size: int) -> None:
        """Refuse a training set of less than one global batch; reads no more than that.

        Raises:
            UserError: names the number of blocks and the largest workable `train.global_batch_size`.
        """
        length, tokens = self.settings.sequence_length, 0
        for ids, _ in tokenise(_pieces(self._source.documents()), self.tokenizer):
            tokens += len(ids)
            if tokens >= global_batch_size * length:
                return
        blocks = tokens // length
        advice = f"train.global_batch_size to {blocks}" if blocks else f"data.sequence_length to {tokens}"
        raise UserError(f"train.global_batch_size={global_batch_size}: the training set of data.source={self.settings.source} "
                        f"has only {blocks} blocks of data.sequence_length={length} tokens, less than one global batch; "
                        f"set {advice} at most")

    def plan(self) -> dict[str, Any]:
        names = ("source", "subset", "split", "column", "document", "validation_source", "validation_fraction",
                 "validation_blocks", "sequence_length", "lanes")
        return {**{name: getattr(self.settings, name) for name in names}, "seed": self.seed, "tokenizer": self.tokenizer.digest,
                **{f"source_{key}": value for key, value in self._source.plan().items()}}

    def close(self) -> None:
        """Nothing to release: files are open only while they are read."""


def train_tokenizer(settings: TextDataSettings, vocab_size: int, out: Path, progress: bool = False) -> Path:
    """Train a byte-level BPE on the training documents (never on the held-out ones) and write `tokenizer.json`.

    Args:
        settings: the `data` section.
        vocab_size: most ids, at least 257; little text may give fewer.
        out: a .json file, or a folder for `tokenizer.json`.
        progress: show a bar.

    Returns:
        The path of the file written.

    Raises:
        UserError: `vocab_size` too small, or whatever is wrong with the source.
    """
    return train_bpe(_training_source(settings, seed=0).documents(), vocab_size, out, progress)


def _spec(settings: TextDataSettings) -> Spec:
    return Spec("data.source", settings.source, settings.subset, settings.split, settings.column, settings.document)


def _training_source(settings: TextDataSettings, seed: int) -> Source:
    fraction = settings.validation_fraction if settings.validation_source is None else 0.0
    return open_source(_spec(settings), fraction=fraction, window=settings.shuffle_window, seed=seed, lanes=settings.lanes)


def _pieces(documents: Iterator[str]) -> Iterator[Piece]:
    for text in documents:
        *body, last = cut(text)
        yield from (Piece(part, False, {}) for part in body)
        yield Piece(last, True, {})
