"""The `data` section of a run on text, and what it says to read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt

from genscale.data.spec import ANSWER_ROLES, TOOLS, Spec, parse_filters
from genscale.errors import UserError, nearest

Document = Literal["paragraph", "line", "file"]
DEFAULT_SOURCE = "python-docs"


@dataclass(frozen=True)
class SourceSettings:
    """An entry of `data.sources`. What is left out is as the data section has it."""

    source: list[str] | str
    """As data.source."""
    weight: float = 1.0
    """Its share of the blocks is this over the sum of all weights; 0 leaves the source out."""
    name: str | None = None
    """What it is called in messages and logs (default: the last part of its path)."""
    subset: str | None = None
    """As data.subset."""
    split: str | None = None
    """As data.split."""
    column: str | None = None
    """As data.column."""
    document: Document | None = None
    """As data.document."""
    filters: dict[str, Any] | None = None
    """As data.filters."""
    prompt_column: str | None = None
    """As data.prompt_column."""
    answer_column: str | None = None
    """As data.answer_column."""
    messages_column: str | None = None
    """As data.messages_column."""
    answer_roles: list[str] | None = None
    """As data.answer_roles."""
    tools_column: str | None = None
    """As data.tools_column."""


@dataclass(frozen=True)
class TextDataSettings:
    """Text to train on."""

    source: list[str] | str = DEFAULT_SOURCE
    """python-stdlib (CPython's standard library, no download), python-docs (its language reference), sums (made sums in which
    the carry is mostly forgotten), a local file or folder of .txt, .jsonl or .parquet (plain or compressed: .gz .zst .xz .bz2),
    the URL of such a file (https://..., streamed), the name of a Hugging Face hub dataset, or a list of these, read one after
    the other. A large source is read fastest in as many files as there are lanes."""
    sources: Any | None = None
    """Several sources mixed by weight, in the place of source: a list of entries {source: ..., weight: ..., column: ...}."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    column: str = "text"
    """Column that holds the text."""
    prompt_column: str | None = None
    """Column of the prompts of prompt/answer pairs, in the place of column: the loss is on the answers only."""
    answer_column: str | None = None
    """Column of their answers."""
    messages_column: str | None = None
    """Column of conversations, each a list of messages {role, content}, written by the chat template of the tokenizer's folder:
    the loss is on what the assistant says."""
    answer_roles: list[str] = field(default_factory=lambda: list(ANSWER_ROLES))
    """Roles of the messages that are learnt; the template is given each as assistant. Often: gpt, model, bot, chatbot."""
    tools_column: str | None = TOOLS
    """Column of the tools that a conversation offers (a list, or the JSON of one); tools need not be there."""
    bad_share: ClosedUnitInterval = 0.01
    """Share of conversations that cannot be learnt from (the template refuses them, an answer is empty, ...) up to which they
    are left out and named; with more of them the run ends."""
    filters: Any | None = None
    """Conditions on the columns of a row, all of which it must fulfil: {language: en, kind: [book, web], score: ">=3, <5"}."""
    min_characters: NonNegativeInt = 0
    """Shorter documents are left out."""
    max_characters: PositiveInt | None = None
    """Longer documents are left out."""
    document: Document = "paragraph"
    """What one document of a .txt file is."""
    max_record_bytes: PositiveInt = 256 * 2**20
    """Longest piece of a file that is held in memory as a whole, decompressed: a line, a paragraph, a row, a .txt file that is
    one document, a parquet file that was compressed once more. A longer one is refused: a small file may grow to any size."""
    validation_source: list[str] | str | None = None
    """Source of the validation set (of a hub dataset, its split "validation"), not filtered. Default: what a folder names so
    beside its training set (train/ and test/, train.jsonl and validation.jsonl), else held-out documents of each source."""
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
    cache: str | None = None
    """Folder that keeps the tokens: written while they are first read (or ahead, by `genscale data build`), read from then on.
    With several sources, a folder for each inside it."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""
    retry_minutes: NonNegativeFloat = 5.0
    """How long a web server that fails is tried again before the run ends; less than guards.hang_minutes."""


@dataclass(frozen=True)
class Reading:
    """A source to read. `label` is its name in logs, unique in the run; `weight` its part in the mixture, above 0."""

    label: str
    weight: float
    spec: Spec


ENTRY = ("subset", "split", "column", "document", "filters", "prompt_column", "answer_column", "messages_column",
         "answer_roles", "tools_column")
OF_ALL = ("retry_minutes", "max_record_bytes", "bad_share")
"""Settings that are the same for all sources."""
PLACE_OF_PAIRS = ("prompt_column", "answer_column", "messages_column")


def readings(settings: TextDataSettings, beside: tuple[str, ...] | None = None) -> list[Reading]:
    """The sources that a data section names: one, or the entries of `data.sources` whose weight is above 0.

    Args:
        beside: of prompts without answers, the columns that travel with them.

    Raises:
        UserError: both or neither are named, a weight is negative or not finite, all are zero, or an entry contradicts itself.
    """
    if settings.sources is None:
        values = {name: getattr(settings, name) for name in (*ENTRY, *OF_ALL)}
        spec = _spec("data.source", settings.source, values, settings, beside)
        return [Reading(_label(settings.source), 1.0, spec)]
    if settings.source != DEFAULT_SOURCE:
        raise UserError(f"data.source={settings.source}: data.sources is set too; make it an entry of data.sources, or leave "
                        "one of the two out")
    if not isinstance(settings.sources, list):
        raise UserError(f"data.sources={settings.sources!r}: must be a list of entries like {{source: PATH, weight: 1}}")
    if not settings.sources:
        raise UserError("data.sources=[]: is an empty list; give it entries like {source: PATH, weight: 1}, or set data.source")
    found: list[Reading] = []
    for number, given in enumerate(settings.sources):
        prefix = f"data.sources[{number}]"
        entry = given if isinstance(given, SourceSettings) else _entry(prefix, given)
        if not math.isfinite(entry.weight) or entry.weight < 0:
            raise UserError(f"{prefix}.weight={entry.weight}: a weight is a finite number of at least 0; 0 leaves the source "
                            "out")
        own = any(getattr(entry, name) for name in PLACE_OF_PAIRS)
        # Text beside pairs keeps its column, and pairs beside conversations theirs.
        values = {name: getattr(entry, name) if getattr(entry, name) is not None or (name in PLACE_OF_PAIRS
                  and (own or entry.column)) else getattr(settings, name) for name in ENTRY}
        values |= {name: getattr(settings, name) for name in OF_ALL}
        spec = _spec(f"{prefix}.source", entry.source, values, settings, beside)
        label, taken = entry.name or _label(entry.source), {reading.label for reading in found}
        if label in taken and entry.name:
            raise UserError(f"{prefix}.name={label}: another entry has this name; give each its own")
        found.append(Reading(label if label not in taken else f"{label}-{number}", entry.weight, spec))
    if not any(reading.weight for reading in found):
        raise UserError("data.sources[0].weight=0: all weights are zero; set at least one above 0")
    return [reading for reading in found if reading.weight]


def _entry(prefix: str, given: Any) -> SourceSettings:
    if not isinstance(given, dict) or "source" not in given:
        raise UserError(f"{prefix}={given!r}: an entry is a mapping with a source, like {{source: PATH, weight: 1}}")
    known = [field.name for field in fields(SourceSettings)]
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{prefix}.{name}: unknown key{nearest(str(name), known)}; the keys are {', '.join(known)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
        fits = {"weight": number, "source": isinstance(value, str) or texts, "filters": True, "answer_roles": texts,
                "document": value in (None, *get_args(Document))}.get(name, value is None or isinstance(value, str))
        if not fits:
            wanted = {"weight": "a number", "source": "text, or a list of texts", "document": "paragraph, line or file",
                      "answer_roles": "a list of texts"}
            raise UserError(f"{prefix}.{name}={value!r}: must be {wanted.get(name, 'text')}")
    return SourceSettings(**given)


def validation_reading(settings: TextDataSettings, beside: tuple[str, ...] | None = None) -> Spec:
    """What `data.validation_source` names."""
    values = {name: getattr(settings, name) for name in (*ENTRY, *OF_ALL)} | {"split": "validation", "filters": None}
    assert settings.validation_source is not None
    return _spec("data.validation_source", settings.validation_source, values, None, beside)


def _spec(key: str, source: Sequence[str] | str, values: dict[str, Any], settings: TextDataSettings | None,
          beside: tuple[str, ...] | None) -> Spec:
    locations = (source,) if isinstance(source, str) else tuple(source)
    if not locations:
        raise UserError(f"{key}=[]: is an empty list; give at least one path, URL or hub name")
    if not all(location.strip() for location in locations):
        raise UserError(f"{key}={source!r}: is empty (was the variable that it comes from not set?); give a path, a URL or a "
                        "hub name")
    spec = Spec(key, locations[0])
    prompt, answer, messages = (values[name] for name in PLACE_OF_PAIRS)
    if beside is None and bool(prompt) != bool(answer):
        there, missing = ("prompt_column", "answer_column") if prompt else ("answer_column", "prompt_column")
        raise UserError(f"{spec.setting(there)}={values[there]}: pairs need {spec.setting(missing)} too; set both, or neither")
    if prompt and messages:
        raise UserError(f"{spec.setting('messages_column')}={messages}: {spec.setting('prompt_column')} is set too; set one of "
                        "the two")
    if not values["answer_roles"]:
        raise UserError(f"{spec.setting('answer_roles')}=[]: names nobody who answers; set it to [assistant], or to the roles "
                        "of the conversations")
    longest = settings.max_characters if settings else None
    if settings and longest is not None and longest < settings.min_characters:
        raise UserError(f"data.max_characters={longest}: is below data.min_characters={settings.min_characters}, so that no "
                        f"document is left; set it to {settings.min_characters} at least")
    several = locations if len(locations) > 1 else ()
    return Spec(key, f"{locations[0]} and {len(several) - 1} more" if several else locations[0], values["subset"],
                values["split"], values["column"], values["document"], locations=several,
                filters=parse_filters(spec.setting("filters"), values["filters"]), prompt=prompt, answer=answer,
                messages=messages, answer_roles=tuple(values["answer_roles"]), tools=values["tools_column"], beside=beside,
                bad_share=values["bad_share"], shortest=settings.min_characters if settings else 0, longest=longest,
                retry_minutes=values["retry_minutes"], max_record_bytes=values["max_record_bytes"])


def _label(source: Sequence[str] | str) -> str:
    """A short name: the last part of the first path, without what a folder's name may not hold."""
    first = source if isinstance(source, str) else source[0] if source else ""
    last = first.split("?")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w-]", "-", re.sub(r"(\.(txt|jsonl|parquet|gz|zst|xz|bz2))+$", "", last)) or "source"
