"""Prompts as training data: one a sample, in canonical lanes; one source or a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain, islice
from typing import Any

from genscale.data.lanes import Cursor, Data, Sample
from genscale.data.plans import digest_of
from genscale.data.python_texts import version_of
from genscale.data.readers import parted_shards
from genscale.data.spec import Spec
from genscale.data.text.mixture import allot, mix
from genscale.data.text.prompt_encoder import PromptEncoder
from genscale.data.text.prompt_settings import PromptDataSettings, as_text
from genscale.data.text.settings import Reading, readings, validation_reading
from genscale.data.text.sources import no_text
from genscale.data.text.stream import documents_of, open_parted
from genscale.data.text.tokenizers import load_tokenizer
from genscale.errors import UserError
from genscale.masking import masked_throughout

BATCH = 32
"""Prompts that are tokenised at a time; a lane that opens or resumes tokenises no more than this ahead."""
LONGEST_RUN = 10_000
"""Prompts after each other that are left out, after which a lane is taken to hold no other."""


class PromptData(Data):
    """Samples as `PromptEncoder` makes them, one a prompt.

    Args:
        settings: the `data` section.
        seed: the run's seed.
        for_training: False where only `validation` will be asked for: with a validation source nothing else is opened.

    Raises:
        UserError: whatever is wrong with a source, a column, the tokenizer or the validation set.
    """

    def __init__(self, settings: PromptDataSettings, seed: int, for_training: bool = True) -> None:
        self.settings, self.seed, self.lane_count = settings, seed, settings.lanes
        self.tokenizer = load_tokenizer(settings.tokenizer)
        self._columns = tuple(dict.fromkeys(settings.columns))
        self._readings = readings(as_text(settings), self._columns)
        if for_training:
            _ = self.streams  # opened now: what is wrong with them must show before anything else is done
        self._validation = self._read_validation()
        self._validation_digest = digest_of(sample[name] for sample in self._validation for name in sorted(sample))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_validation": []}  # worker processes read lanes

    @cached_property
    def streams(self) -> list[PromptStream]:
        """The sources to train on."""
        return [PromptStream(reading, self.settings, self.seed, self._encoder(reading.spec)) for reading in self._readings]

    def _encoder(self, spec: Spec) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, spec, self.settings.prompt_tokens, self.settings.row_bytes)

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        if not self.settings.sources:
            return self.streams[0].open_lane(lane, cursor)
        weights = [reading.weight for reading in self._readings]
        return mix([stream.open_lane for stream in self.streams], weights, self.seed, lane, cursor)

    def validation(self) -> list[Sample]:
        return self._validation

    def _read_validation(self) -> list[Sample]:
        count = self.settings.validation_prompts
        if self.settings.validation_source is not None:
            spec = validation_reading(as_text(self.settings), self._columns)
            training, held = parted_shards(spec)
            with spec.left_out.of_the_whole():
                samples = list(islice(_encoded(documents_of(held or training), self._encoder(spec)), count))
            if not samples:
                raise no_text(spec)
            return samples
        parts = allot(count, [reading.weight for reading in self._readings])
        samples = list(chain.from_iterable(stream.held_out(part) for stream, part in zip(self.streams, parts, strict=True)))
        if samples:
            return samples
        raise UserError(f"data.validation_fraction={self.settings.validation_fraction}: no prompt falls into the validation "
                        "set; set a larger share, or data.validation_source")

    def check(self, global_batch_size: int) -> None:
        """Refuse a training set of less than one global batch; reads no more than that.

        Raises:
            UserError: names the number of prompts, and the largest workable `train.global_batch_size`.
        """
        prompts = chain.from_iterable(stream.prompts() for stream in self.streams)
        found = sum(1 for _ in islice(prompts, global_batch_size))
        if found < global_batch_size:
            raise UserError(f"train.global_batch_size={global_batch_size}: the training set has only {found} prompts, less "
                            f"than one global batch; set train.global_batch_size to {found} at most")

    def plan(self) -> dict[str, Any]:
        names = ("source", "subset", "split", "prompt_column", "messages_column", "columns", "filters", "prompt_tokens",
                 "row_bytes", "validation_source", "validation_fraction", "validation_prompts", "lanes")
        plan = {name: getattr(self.settings, name) for name in names}
        plan = masked_throughout({**plan, "seed": self.seed, "tokenizer": self.tokenizer.digest,
                                  "validation_content": self._validation_digest})
        if not self.settings.sources:
            return plan | self.streams[0].plan()
        for stream in self.streams:
            prefix = stream.spec.setting("")
            plan |= {f"{prefix}{key.removeprefix('source_')}": value for key, value in stream.plan().items()}
            plan[f"{prefix}weight"] = stream.weight
        return plan

    def close(self) -> None:
        """Nothing is open but what is being read."""


class PromptStream:
    """One source of prompts in lanes.

    Raises:
        UserError: whatever is wrong with it.
    """

    def __init__(self, reading: Reading, settings: PromptDataSettings, seed: int, encoder: PromptEncoder) -> None:
        self.spec, self.weight, self._encoder = reading.spec, reading.weight, encoder
        training, self._held = parted_shards(self.spec)
        self.source = open_parted(self.spec, as_text(settings), seed, training, self._held, encoder)

    def open_lane(self, lane: int, cursor: Cursor | None = None) -> Iterator[tuple[Sample, Cursor]]:
        """Endless prompts of a lane, each with the cursor that continues right after it."""
        passed = 0
        for window in self.source.windows(lane, cursor["place"] if cursor else None):
            for first in range(window.start[0], len(window.rows), BATCH):
                numbers = range(first, min(first + BATCH, len(window.rows)))
                samples = self._encoder.encode([window.text(n) for n in numbers])
                passed = passed + len(samples) if not any(samples) else 0
                if passed > LONGEST_RUN and self.spec.left_out.first is not None:
                    raise self.spec.left_out.first
                for n, sample in zip(numbers, samples, strict=True):
                    if sample is not None:
                        yield sample, {"place": window.place(n + 1, 0)}

    def held_out(self, limit: int) -> list[Sample]:
        """The first held-out prompts in canonical order."""
        documents = documents_of(self._held) if self._held else self.source.held_out()
        return list(islice(_encoded(documents, self._encoder), limit))

    def prompts(self) -> Iterator[Sample]:
        """The training prompts in canonical order, once."""
        return _encoded(self.source.documents(), self._encoder)

    def plan(self) -> dict[str, Any]:
        """What the samples of this source depend on besides the data section, as JSON."""
        versions = version_of(self.spec.locations or (self.spec.name,))
        plan = {f"source_{key}": value for key, value in (self.source.plan() | versions).items()}
        return {**plan, "chat_template": self._encoder.digest}


def _encoded(documents: Iterable[str], encoder: PromptEncoder) -> Iterator[Sample]:
    """Without those that are left out."""
    for document in documents:
        if (sample := encoder.encode([document])[0]) is not None:
            yield sample
