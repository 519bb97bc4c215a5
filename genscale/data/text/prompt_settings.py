"""The `data` section of a run on prompts: what is asked, and what is known of each question."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt

from genscale.data.spec import SUMS
from genscale.data.text.settings import TextDataSettings


@dataclass(frozen=True)
class PromptDataSettings:
    """Prompts to answer."""

    source: list[str] | str = SUMS
    """sums (made sums, no download), a local file or folder of .jsonl or .parquet (plain or compressed), the URL of such a
    file, the name of a Hugging Face hub dataset, or a list of these, read one after the other."""
    sources: Any | None = None
    """Several sources mixed by weight, in the place of source: a list of entries {source: ..., weight: ...}."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    prompt_column: str = "prompt"
    """Column of the prompts. Where the tokenizer's folder has a chat template, a prompt is what the user says."""
    messages_column: str | None = None
    """Column of conversations, each a list of messages {role, content} that the chat template writes, in the place of
    prompt_column; the answer follows the last message."""
    columns: list[str] = field(default_factory=list)
    """Columns that rewards read, as [answer]; they travel with their prompt."""
    filters: Any | None = None
    """Conditions on the columns of a row, all of which it must fulfil: {language: en, kind: [book, web], score: ">=3, <5"}."""
    prompt_tokens: PositiveInt = 128
    """Longest prompt; a longer one is left out, as is an empty one, and both are named."""
    row_bytes: PositiveInt = 1024
    """Most bytes of a prompt and its `columns` as JSON; a row that has more is left out, and named."""
    bad_share: ClosedUnitInterval = 0.01
    """Share of prompts that cannot be asked up to which they are left out and named; with more of them the run ends."""
    max_record_bytes: PositiveInt = 256 * 2**20
    """Longest row that is held in memory, decompressed."""
    validation_source: list[str] | str | None = None
    """Source of the validation set (of a hub dataset, its split "validation"), not filtered. Default: what a folder names so
    beside its training set (train.jsonl and validation.jsonl), else held-out prompts of each source."""
    validation_fraction: OpenUnitInterval = 0.05
    """Share of the source's prompts held out for validation when there is no validation source."""
    validation_prompts: PositiveInt = 128
    """At most so many prompts of the validation set are used."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or of a folder that holds one (default: that of model.from)."""
    lanes: PositiveInt = 48
    """Parallel streams that make up the sample order, whatever the number of processes."""
    shuffle_window: PositiveInt = 256
    """Prompts shuffled together in a lane when the source is too large for memory; a smaller one is shuffled as a whole."""
    retry_minutes: NonNegativeFloat = 5.0
    """How long a web server that fails is tried again before the run ends; less than guards.hang_minutes."""

    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""


AS_TEXT = ("subset", "split", "filters", "bad_share", "max_record_bytes", "validation_source",
           "validation_fraction", "tokenizer", "lanes", "shuffle_window", "retry_minutes")


def as_text(settings: PromptDataSettings) -> TextDataSettings:
    """The same for what reads texts: which rows of which files, in which order."""
    same: dict[str, Any] = {name: getattr(settings, name) for name in AS_TEXT}
    if settings.sources is None or settings.source != SUMS:
        same["source"] = settings.source
    column = "messages_column" if settings.messages_column else "prompt_column"
    return TextDataSettings(**same, **{column: getattr(settings, column)}, sources=settings.sources, tools_column=None)
