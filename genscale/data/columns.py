"""From the rows of an Arrow table to documents: the text column, or the columns of prompt/answer pairs, and row filters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from genscale.errors import UserError, nearest

COMPARISONS = {">=": "greater_equal", "<=": "less_equal", "!=": "not_equal", "==": "equal", ">": "greater", "<": "less"}
COMPARISON = re.compile(r"(>=|<=|!=|==|>|<)\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Filter:
    """One condition on a row. `comparison` is a function of pyarrow.compute, or "in" with a tuple as `value`."""

    column: str
    comparison: str
    value: Any


@dataclass(frozen=True)
class Spec:
    """What to read: one entry of the `data` section.

    Attributes:
        key: the setting that names the source, for messages.
        name: the source, for messages; where there are several locations, the first of them and their number.
        subset, split, column, document: see `TextDataSettings`.
        revision: commit of a hub dataset.
        locations: what to read one after the other, where the source is a list.
        filters: conditions that a row must fulfil, all of them.
        prompt, answer, messages: columns of prompt/answer pairs, in the place of `column`.
        shortest, longest: characters of the documents that are read.
        retry_minutes: how long a server that fails is tried again.
    """

    key: str
    name: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    document: str = "paragraph"
    revision: str | None = None
    locations: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    shortest: int = 0
    longest: int | None = None
    retry_minutes: float = 5.0
    local_advice: ClassVar[str] = "give the path of a local file or folder (.txt, .jsonl, .parquet), or python-docs"

    def setting(self, name: str) -> str:
        """Full key of another setting of the same entry."""
        return f"{self.key.rpartition('.')[0]}.{name}"

    @property
    def pairs(self) -> bool:
        """Whether the documents are prompt/answer pairs: a JSON list of messages each, never to be cut."""
        return bool(self.messages or self.prompt)

    @property
    def content(self) -> dict[str, str]:
        """Setting -> column of what a document is made of."""
        if self.messages:
            return {"messages_column": self.messages}
        return {"prompt_column": self.prompt, "answer_column": self.answer} if self.prompt else {"column": self.column}

    @property
    def columns(self) -> list[str]:
        """Every column that is looked at."""
        return list(dict.fromkeys([*self.content.values(), *(rule.column for rule in self.filters)]))

    def unknown_columns(self, where: str, columns: Sequence[str]) -> UserError | None:
        """The error for a column that `where` does not have."""
        named = [*self.content.items(), *((f"filters.{rule.column}", rule.column) for rule in self.filters)]
        for setting, column in named:
            if column not in columns:
                purpose = "of the filter" if setting.startswith("filters.") else "that holds the text"
                return UserError(f"{self.setting(setting)}={column}: {where} of {self.key}={self.name} has the columns "
                                 f"{', '.join(columns)}{nearest(column, columns)}; set {self.setting(setting)} to the one "
                                 f"{purpose}")
        return None


def parse_filters(key: str, filters: Mapping[str, Any] | None) -> tuple[Filter, ...]:
    """The conditions that a `filters` setting means: column -> value, list of values, or text like ">=3" or ">=3, <5".

    Raises:
        UserError: a condition that is none.
    """
    if not isinstance(filters or {}, Mapping):
        raise UserError(f"{key}={filters!r}: must be conditions by column, like {{language: en, score: \">=3\"}}")
    found = []
    for column, wanted in (filters or {}).items():
        where = f"{key}.{column}={wanted!r}"
        advice = "give a value, a list of values, or a comparison like \">=3\" or \">=3, <5\""
        if isinstance(wanted, str) and COMPARISON.match(wanted):
            for part in re.split(r",\s*(?=[<>!=])", wanted):
                sign, text = COMPARISON.match(part).groups()
                if not text.strip() and sign not in ("==", "!="):
                    raise UserError(f"{where}: nothing stands after {sign}; {advice}")
                found.append(Filter(column, COMPARISONS[sign], _number(text.strip())))
        elif isinstance(wanted, list) and wanted and all(isinstance(value, (str, int, float)) for value in wanted):
            found.append(Filter(column, "in", tuple(wanted)))
        elif isinstance(wanted, (str, bool, int)) or (isinstance(wanted, float) and math.isfinite(wanted)):
            found.append(Filter(column, "equal", wanted))
        else:
            raise UserError(f"{where}: is no condition; {advice}")
    return tuple(found)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)


def documents(table: Any, spec: Spec, where: str, first: int, start: int, step: int) -> list[str | None]:
    """The documents of the rows `start::step` of a table; None for a row without text or that a filter leaves out.

    Only the rows wanted become Python objects.

    Args:
        table: an Arrow table.
        spec, where: what is read, and the name of its shard.
        first: number of the table's first row in the shard, for messages.

    Raises:
        UserError: a column is not there or of another type, or an answer is empty.
    """
    import pyarrow as pa

    if error := spec.unknown_columns(where, table.column_names):
        raise error
    names = table.column_names
    table = table.select(spec.columns)
    rows = table.slice(start) if step == 1 else table.take(pa.array(range(start, len(table), step), pa.int64()))
    if not len(rows):
        return []
    kept = _kept(rows, spec, where)
    if kept is not None:
        kept = kept.to_pylist()
    if spec.pairs:
        texts = _pairs(rows, spec, where, kept, lambda i: f"row {first + start + i * step} of {where}")
    else:
        texts = _texts(rows, spec, where, names)
    if kept is not None:
        texts = [text if keep else None for text, keep in zip(texts, kept, strict=True)]
    if spec.shortest or spec.longest is not None:
        texts = [text if text is not None and _fits(text, spec) else None for text in texts]
    return texts


def _texts(rows: Any, spec: Spec, where: str, names: Sequence[str]) -> list[str | None]:
    column = rows[spec.column]
    if not _is_text(column.type):
        raise UserError(f"{spec.setting('column')}={spec.column}: in {where} it holds {column.type}, not text; the columns are "
                        f"{', '.join(names)}")
    return [text if text is not None and text.strip() else None for text in column.to_pylist()]


def _pairs(rows: Any, spec: Spec, where: str, kept: list[bool] | None,
           row_of: Callable[[int], str]) -> list[str | None]:
    import pyarrow as pa

    if spec.messages:
        kind = rows[spec.messages].type
        if not (pa.types.is_null(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise UserError(f"{spec.setting('messages_column')}={spec.messages}: in {where} it holds {kind}, not a list of "
                            "messages with role and content; set prompt_column and answer_column for plain pairs")
        conversations = rows[spec.messages].to_pylist()
    else:
        for setting, column in spec.content.items():
            if not _is_text(rows[column].type):
                raise UserError(f"{spec.setting(setting)}={column}: in {where} it holds {rows[column].type}, not text")
        conversations = [None if prompt is None and answer is None else
                         [{"role": "user", "content": prompt or ""}, {"role": "assistant", "content": answer}]
                         for prompt, answer in zip(rows[spec.prompt].to_pylist(), rows[spec.answer].to_pylist(), strict=True)]
    return [_conversation(messages, spec, row_of(i)) if messages and (kept is None or kept[i]) else None
            for i, messages in enumerate(conversations)]


def _conversation(messages: list[Any], spec: Spec, where: str) -> str | None:
    """A document of a conversation; None where nobody answers, for there is nothing to learn in it."""
    setting = "messages_column" if spec.messages else "answer_column"
    key = f"{spec.setting(setting)}={spec.messages or spec.answer}"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{key}: {where} holds {str(message)[:80]!r}, not a message with role and content")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"{key}: in {where} the content of a message is {str(content)[:80]!r}, not text")
        if message["role"] == "assistant" and not (content or "").strip():
            advice = f"; {spec.setting('filters')} with {spec.answer}: \"!=\" leaves such rows out" if spec.answer else ""
            raise UserError(f"{key}: {where} has an empty answer; mend or remove it{advice}")
    if all(message["role"] != "assistant" for message in messages):
        return None
    # Arrow gives every message the keys of all; the ones it does not have are None.
    plain = [{name: value for name, value in message.items() if value is not None} for message in messages]
    return json.dumps(plain, ensure_ascii=False, default=str)  # a message may carry its time


def pair_text(document: str) -> str:
    """What the messages of a prompt/answer document say, for learning a vocabulary from it."""
    return "\n".join(message.get("content", "") for message in json.loads(document))


def _fits(text: str, spec: Spec) -> bool:
    size = sum(len(message.get("content", "")) for message in json.loads(text)) if spec.pairs else len(text)
    return spec.shortest <= size and (spec.longest is None or size <= spec.longest)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _kept(rows: Any, spec: Spec, where: str) -> Any:
    """Which rows the filters keep (a row whose value is missing is not kept), or None where there is no filter."""
    import pyarrow.compute as pc

    masks = [pc.fill_null(_holds(rows[rule.column], rule, spec, where), False) for rule in spec.filters]
    return reduce(pc.and_, masks) if masks else None


def _holds(column: Any, rule: Filter, spec: Spec, where: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    values = rule.value if rule.comparison == "in" else (rule.value,)
    if pa.types.is_null(kind):
        return pa.array([False] * len(column))
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    for allowed, types, words in ((_is_text(kind), str, "text"), (pa.types.is_boolean(kind), bool, "true or false"),
                                  (number, (int, float), "numbers"), (pa.types.is_temporal(kind), str, "dates")):
        if not allowed:
            continue
        wrong = [value for value in values if not isinstance(value, types) or (number and isinstance(value, bool))]
        if not wrong:
            break
        if _is_text(kind) and rule.comparison in ("equal", "not_equal") and not isinstance(wrong[0], bool):
            return _holds(column, Filter(rule.column, rule.comparison, str(wrong[0])), spec, where)  # `year: 1999`
        raise _wrong_type(spec, rule, wrong[0], where, f"holds {words} ({kind})")
    else:
        raise _wrong_type(spec, rule, values[0], where, f"holds {kind}; filters compare text, numbers, true/false and dates")
    try:
        scalars = [pa.scalar(value).cast(kind) if pa.types.is_temporal(kind) else pa.scalar(value) for value in values]
        compare = getattr(pc, "equal" if rule.comparison == "in" else rule.comparison)
        return reduce(pc.or_, [compare(column, scalar) for scalar in scalars])
    except (pa.ArrowException, NotImplementedError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise _wrong_type(spec, rule, values[0], where, f"holds {words} ({kind}); {reason}") from None


def _wrong_type(spec: Spec, rule: Filter, value: Any, where: str, reason: str) -> UserError:
    return UserError(f"{spec.setting('filters')}.{rule.column}={value!r}: cannot be compared with the column, which in {where} "
                     f"{reason}")
