"""Text as training data: documents in tokens, packed end to end into blocks, in canonical lanes; one source or a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.folders import say_seen
from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.plans import digest_of
from genscale.data.readers import parted_shards, place
from genscale.data.spec import ANSWER_ROLES, TOOLS
from genscale.data.text.mixture import allot, interleave, mix
from genscale.data.text.settings import SourceSettings, TextDataSettings, readings, validation_reading
from genscale.data.text.sources import no_text
from genscale.data.text.stream import (
    TextStream,
    documents_of,
    open_training_source,
    pair_encoder,
    plain_documents,
    validation_samples,
)
from genscale.data.text.tokenizers import load_tokenizer, train_bpe
from genscale.data.text.vocabulary import Progress, reported
from genscale.errors import UserError
from genscale.masking import masked_throughout

__all__ = ["SourceSettings", "TextData", "TextDataSettings", "train_tokenizer"]


class TextData(Data):
    """Samples `{"tokens": int32 (sequence_length + 1,)}`; each block starts at the last token of the one before it, of its
    source in its lane. Where prompt/answer pairs are among the sources, every sample also has `mask`, uint8 of the same shape:
    1 on the tokens to be predicted.

    Validation samples come from the held-out documents in canonical order, of several sources as many as their weights have
    it; the last one of each is filled up with -1.

    Args:
        settings: the `data` section.
        seed: the run's seed.
        for_training: False where only `validation` will be asked for: with a validation source nothing else is opened.

    Raises:
        UserError: whatever is wrong with a source, a column, the tokenizer, the cache or the validation set.
    """

    def __init__(self, settings: TextDataSettings, seed: int, for_training: bool = True) -> None:
        self.settings, self.seed, self.lane_count = settings, seed, settings.lanes
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self._readings = readings(settings)
        self._masked = any(reading.spec.pairs for reading in self._readings)
        if for_training:
            _ = self.streams  # opened now: what is wrong with them must show before anything else is done
        self._validation = self._read_validation()
        self._validation_digest = digest_of(sample[name] for sample in self._validation for name in sorted(sample))
        targets = [_targets(sample) for sample in self._validation]
        if not any(map(len, targets)):
            raise UserError(f"data.validation_blocks={settings.validation_blocks}: these blocks of the validation set hold no "
                            "token of an answer; set more, or a larger data.sequence_length")
        sizes = self.tokenizer.token_bytes()
        if sizes is not None and not any(sizes[ids].any() for ids in targets):  # bits per byte would be of none
            key = "validation_fraction" if settings.validation_source is None else "validation_source"
            raise UserError(f"data.{key}={getattr(settings, key)}: of this validation set nothing is to be predicted but where "
                            "its text ends; give one with more text")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validation": []}  # worker processes read lanes, and write the cache

    @cached_property
    def streams(self) -> list[TextStream]:
        """The sources to train on."""
        return [TextStream(reading, self.settings, self.seed, self.tokenizer, self._masked, self._cache(reading.label))
                for reading in self._readings]

    def _cache(self, label: str) -> Path | None:
        if self.settings.cache is None:
            return None
        return Path(self.settings.cache).expanduser() / (label if self.settings.sources else "")

    @property
    def _weights(self) -> list[float]:
        return [stream.weight for stream in self.streams]

    @property
    def _named(self) -> str:
        """The setting of what is read, for messages."""
        return "data.sources" if self.settings.sources else f"data.source={self.streams[0].spec.name}"

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        if not self.settings.sources:
            return self.streams[0].open_lane(lane, cursor)
        return mix([stream.open_lane for stream in self.streams], self._weights, self.seed, lane, cursor)

    def tokens_per_source(self, cursors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
        """Tokens that a mixture's sources have given up to a position: label -> tokens; empty for a single source.

        Args:
            cursors: `cursors` of `StepLoader.state()`, or of several ranks' states merged.
        """
        if not self.settings.sources:
            return {}
        blocks = [entry["cursor"]["blocks"] for entry in cursors.values()]
        return {stream.label: self.settings.sequence_length * sum(counts[number] for counts in blocks)
                for number, stream in enumerate(self.streams)}

    def validation(self) -> list[Sample]:
        return self._validation

    def _read_validation(self) -> list[Sample]:
        settings = self.settings
        if settings.validation_source is not None:
            spec = validation_reading(settings)
            training, held = parted_shards(spec)
            for stream in self.__dict__.get("streams", ()):  # which need not be opened for this
                say_seen(f"{spec.key}={spec.name}", f"{stream.spec.key}={stream.spec.name}", map(place, held or training),
                         map(place, stream.shards))
            pairs = pair_encoder(spec, settings, self.tokenizer)
            with spec.left_out.of_the_whole():
                samples = validation_samples(documents_of(held or training), pairs, self.tokenizer, settings.sequence_length,
                                             self._masked or spec.pairs, settings.validation_blocks)
            if not samples:
                raise no_text(spec)
            return samples
        parts = allot(settings.validation_blocks, self._weights)
        samples = list(chain.from_iterable(stream.held_out(part) for stream, part in zip(self.streams, parts, strict=True)))
        if samples:
            return samples
        raise UserError(f"data.validation_fraction={settings.validation_fraction}: no document of {self._named} falls into the "
                        "validation set; set a larger share, or data.validation_source")

    def check(self, global_batch_size: int) -> None:
        """Refuse a training set of less than one global batch; reads no more than that.

        Raises:
            UserError: names the number of blocks and the largest workable `train.global_batch_size`.
        """
        length, tokens = self.settings.sequence_length, 0
        for size in chain.from_iterable(stream.lengths() for stream in self.streams):
            tokens += size
            if tokens >= global_batch_size * length:
                return
        blocks = tokens // length
        advice = f"train.global_batch_size to {blocks}" if blocks else f"data.sequence_length to {tokens}"
        raise UserError(f"train.global_batch_size={global_batch_size}: the training set of {self._named} has only {blocks} "
                        f"blocks of data.sequence_length={length} tokens, less than one global batch; set {advice} at most")

    def plan(self) -> dict[str, Any]:
        names = ("source", "subset", "split", "column", "document", "validation_source", "validation_fraction",
                 "validation_blocks", "sequence_length", "lanes")
        later = ("filters", "min_characters", "max_characters", "prompt_column", "answer_column", "messages_column", "options")
        plan = {**{name: getattr(self.settings, name) for name in names}, "seed": self.seed, "tokenizer": self.tokenizer.digest,
                **{name: getattr(self.settings, name) for name in later if getattr(self.settings, name)}}
        if self._masked:
            own = {"answer_roles": list(ANSWER_ROLES), "tools_column": TOOLS}
            plan |= {name: value for name, usual in own.items() if (value := getattr(self.settings, name)) != usual}
        plan = masked_throughout(plan)
        if not self.settings.sources:
            return plan | self.streams[0].plan() | self._validation_plan()
        for stream in self.streams:
            prefix = stream.spec.setting("")
            # Which entry reads what is in its content; its weight is the order.
            plan |= {f"{prefix}{key.removeprefix('source_')}": value for key, value in stream.plan().items()}
            plan[f"{prefix}weight"] = stream.weight
        return plan | self._validation_plan()

    def _validation_plan(self) -> dict[str, str]:
        """What tells a validation set apart that is no share of the training documents."""
        own = self.settings.validation_source is not None or any(stream.brings_validation for stream in self.streams)
        return {"validation_content": self._validation_digest} if own else {}

    def close(self) -> None:
        """Write out what the token cache keeps back."""
        for stream in self.__dict__.get("streams", ()):  # not opened for the sake of closing
            stream.close()


def _targets(sample: Sample) -> np.ndarray:
    """The tokens of the block that are to be predicted: never its first."""
    wanted = sample["mask"] > 0 if "mask" in sample else sample["tokens"] >= 0
    return sample["tokens"][1:][wanted[1:]]


def train_tokenizer(settings: TextDataSettings, vocab_size: int, out: Path, progress: Progress | None = None,
                    megabytes: int | None = None) -> Path:
    """Train a byte-level BPE on the training documents (never on the held-out ones) and write `tokenizer.json`.

    The documents are read once, one at a time; what is held in memory grows with the number of distinct words alone.

    Args:
        settings: the `data` section; several sources are read in proportion to their weights.
        vocab_size: most ids, at least 257; little text may give fewer.
        out: a .json file, or a folder for `tokenizer.json`.
        progress: told how far the reading is.
        megabytes: most text to read.

    Returns:
        The path of the file written.

    Raises:
        UserError: `vocab_size` too small, or whatever is wrong with a source.
    """
    sources = readings(settings)
    documents = [plain_documents(reading.spec, open_training_source(reading.spec, settings, seed=0).documents())
                 for reading in sources]
    texts = interleave(documents, [reading.weight for reading in sources])
    return train_bpe(reported(texts, progress, megabytes), vocab_size, out)
