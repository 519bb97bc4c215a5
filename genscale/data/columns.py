"""From the rows of a table to documents: the text column, or the columns of prompt/answer pairs, and row filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache, reduce
from operator import and_
from typing import Any, cast

from genscale.data.conversations import conversations, read_document, said
from genscale.data.json_values import Values, shown
from genscale.data.prompts import prompts
from genscale.data.spec import Filter, Spec
from genscale.errors import UserError

ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]|$)")
RowOf = Callable[[int], str]
"""What to call the n-th of the rows that are looked at, in messages."""


def documents(table: Any, spec: Spec, where: str, first: int, start: int, step: int) -> list[str | None]:
    """The documents of the rows `start::step` of a table; None for a row without text or that a filter leaves out.

    Only the rows wanted become Python objects.

    Args:
        table: an Arrow table, or the `Values` of a file of JSON or text.
        spec, where: what is read, and the name of its shard.
        first: number of the table's first row in the shard, for messages.

    Raises:
        UserError: a column is not there or holds something else, or an answer is empty.
    """
    if isinstance(table, Values):
        if not table.columns.keys() >= {rule.column for rule in spec.filters}:  # of a text file
            raise cast(UserError, spec.unknown_columns(where, table.names))
        rows = {name: values[start::step] for name, values in table.columns.items()}
    else:
        if error := spec.unknown_columns(where, table.column_names):
            raise error
        rows = _every(table.select([name for name in spec.columns if name in table.column_names]), start, step)

    def row_of(i: int) -> str:
        return f"row {first + start + i * step} of {where}"

    kept = _kept(rows, spec, where, row_of)
    if kept is not None and isinstance(table, Values):  # what is left out may be anything
        rows = {name: [value if keep else None for value, keep in zip(column, kept, strict=True)]
                for name, column in rows.items()}
    wanted = {**spec.content, "tools_column": spec.tools} if spec.messages and spec.tools in rows else spec.content
    names = table.names if isinstance(table, Values) else table.column_names
    contents = {column: _content(rows[column], f"{spec.setting(setting)}={column}", setting, where, names, row_of)
                for setting, column in wanted.items()}
    if spec.beside is not None:
        beside = {column: _content(rows[column], f"{spec.setting('columns')}={column}", "columns", where, names, row_of)
                  for column in spec.beside}
        texts = prompts(next(iter(contents.values())), beside, spec, kept, row_of)
    elif spec.pairs:
        try:
            texts = conversations(contents, spec, kept, row_of)
        except UserError as error:
            if isinstance(table, Values) and table.missing:  # no row has an answer, for want of the column
                raise spec.unknown_columns(where, table.names) or error from None
            raise
    else:
        texts = [text if text is not None and text.strip() else None for text in contents[spec.column]]
    if kept is not None:
        texts = [text if keep else None for text, keep in zip(texts, kept, strict=True)]
    if spec.shortest or spec.longest is not None:
        texts = [text if text is not None and _fits(text, spec) else None for text in texts]
    return texts


def _every(table: Any, start: int, step: int) -> dict[str, Any]:
    """The columns of the rows `start::step` of an Arrow table."""
    import pyarrow as pa

    if step == 1:
        table = table.slice(start)
    else:
        try:
            table = table.take(pa.array(range(start, len(table), step), pa.int64()))
        except pa.ArrowNotImplementedError:  # of strings as views
            table = pa.concat_tables([table.slice(row, 1) for row in range(start, len(table), step)] or [table.slice(0, 0)])
    return dict(zip(table.column_names, table.columns, strict=True))


def _content(column: Any, key: str, setting: str, where: str, names: Sequence[str], row_of: RowOf) -> list[Any]:
    """The values of a column: texts, or for messages and tools what JSON could say."""
    is_text = setting in ("column", "prompt_column", "answer_column")
    wanted = {"column": f"text; the columns are {', '.join(names)}", "prompt_column": "text", "answer_column": "text",
              "messages_column": "a list of messages with role and content; set prompt_column and answer_column for plain pairs"
              }.get(setting)
    if not isinstance(column, list):
        return _arrow_content(column, key, wanted, is_text, where, row_of)
    if setting == "column":
        for i, value in enumerate(column):
            if value is not None and not isinstance(value, str):
                raise UserError(f"{key}: {row_of(i)} holds {shown(value)}, not {wanted}")
    return column


def _arrow_content(column: Any, key: str, wanted: str | None, is_text: bool, where: str, row_of: RowOf) -> list[Any]:
    import pyarrow as pa

    column = _decoded(column)
    fits = _is_text(column.type) if is_text else not wanted or pa.types.is_null(column.type) or _is_list(column.type)
    if not fits:
        raise UserError(f"{key}: in {where} it holds {column.type}, not {wanted}")
    if not is_text:
        return [_as_json(value) for value in column.to_pylist()]
    try:
        return _as_string(column).to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        for i, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
            try:
                (value or b"").decode()
            except UnicodeDecodeError as wrong:
                raise UserError(f"{key}: {row_of(i)} holds bytes that are no text ({wrong}); mend or remove it") from None
        raise error


def _as_json(value: Any) -> Any:
    """A value of an Arrow table as JSON would have it: a struct has every key in every row, with null for those it lacks."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) for pair in value):  # a map
            return {name: _as_json(inner) for name, inner in value}
        return [_as_json(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value


def _fits(text: str, spec: Spec) -> bool:
    size = sum(len(said(message)) for message in read_document(text)[0]) if spec.pairs else len(text)
    return spec.shortest <= size and (spec.longest is None or size <= spec.longest)


def _decoded(column: Any) -> Any:
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _as_string(column: Any) -> Any:
    """Text of the types that Arrow does not compare, or gives as bytes, in one that it does. Raises ArrowInvalid."""
    import pyarrow as pa

    kind = column.type
    return column.cast(pa.large_string()) if _is_binary(kind) or pa.types.is_string_view(kind) else column


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_list_view,
                                       pa.types.is_large_list_view, pa.types.is_fixed_size_list))


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or _is_binary(kind)
            or pa.types.is_null(kind))


def _kept(rows: dict[str, Any], spec: Spec, where: str, row_of: RowOf) -> list[bool] | None:
    """Which rows the filters keep (a row whose value is missing is not kept), or None where there is no filter."""
    if not spec.filters:
        return None
    import pyarrow.compute as pc

    masks = [_json_mask(column, rule, spec, row_of) if isinstance(column := rows[rule.column], list) else
             pc.fill_null(_holds(column, rule, spec, where), False).to_pylist() for rule in spec.filters]
    return reduce(lambda one, other: list(map(and_, one, other)), masks)


def _json_mask(column: list[Any], rule: Filter, spec: Spec, row_of: RowOf) -> list[bool]:
    """Which values a filter keeps. Each is compared as what it is: JSON may have numbers in one row and text in the next."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = rule.value if rule.comparison == "in" else (rule.value,)
    if any(isinstance(value, str) and ISO_DATE.match(value) for value in values):
        column = [_moment(value) if type(value) is str else value for value in column]
        moments = tuple(_moment(value) if type(value) is str else value for value in values)
        rule = Filter(rule.column, rule.comparison, moments if rule.comparison == "in" else moments[0])
    kinds = set(map(type, column)) - {type(None)}
    if len(kinds) > 1:
        masks = [_json_mask([value if type(value) is kind else None for value in column], rule, spec, row_of) for kind in kinds]
        return [any(holds) for holds in zip(*masks, strict=True)]
    if not kinds:
        return [False] * len(column)
    first = next(i for i, value in enumerate(column) if value is not None)
    if kinds <= {list, dict}:
        raise _wrong_type(spec, rule, values[0], row_of(first), f"holds {shown(column[first])}; filters compare text, numbers, "
                          "true/false and dates")
    try:
        array = pa.array(column)
    except (pa.ArrowException, OverflowError):  # integers beyond 64 bits
        array = pa.array([value if value is None else float(value) for value in column])
    return pc.fill_null(_holds(array, rule, spec, row_of(first)), False).to_pylist()


@lru_cache(maxsize=2**12)
def _moment(value: str) -> str:
    """A date or time of ISO 8601 in a spelling whose order is that of time (UTC where it has a zone); else the value as it is.

    JSON has dates as text alone, written in many ways."""
    if not ISO_DATE.match(value):
        return value
    if len(value) == 10:
        return f"{value} 00:00:00.000000"
    try:
        moment = datetime.fromisoformat(value)
        return (moment.astimezone(UTC) if moment.tzinfo else moment).replace(tzinfo=None).isoformat(" ", "microseconds")
    except (ValueError, OverflowError):
        return value


def _holds(column: Any, rule: Filter, spec: Spec, where: str) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _decoded(column)
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
        column = _as_string(column)
        scalars = [pa.scalar(value).cast(kind) if pa.types.is_temporal(kind) else pa.scalar(value) for value in values]
        compare = getattr(pc, "equal" if rule.comparison == "in" else rule.comparison)
        return reduce(pc.or_, [compare(column, scalar) for scalar in scalars])
    except (pa.ArrowException, NotImplementedError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise _wrong_type(spec, rule, values[0], where, f"holds {words} ({kind}); {reason}") from None


def _wrong_type(spec: Spec, rule: Filter, value: Any, where: str, reason: str) -> UserError:
    return UserError(f"{spec.setting('filters')}.{rule.column}={value!r}: cannot be compared with the column, which in {where} "
                     f"{reason}")
