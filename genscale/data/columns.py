"""From the rows of an Arrow table to documents: the text column, or the columns of prompt/answer pairs, and row filters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from genscale.data.conversations import conversations, read_document, said
from genscale.data.spec import Filter, Spec
from genscale.errors import UserError


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
    table = table.select([name for name in spec.columns if name in names])
    rows = table.slice(start) if step == 1 else table.take(pa.array(range(start, len(table), step), pa.int64()))
    if not len(rows):
        return []
    kept = _kept(rows, spec, where)
    if kept is not None:
        kept = kept.to_pylist()
    if spec.pairs:
        texts = conversations(_lists(rows, spec, where), spec, kept, lambda i: f"row {first + start + i * step} of {where}",
                              padded=True)
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


def _lists(rows: Any, spec: Spec, where: str) -> dict[str, list[Any]]:
    """The columns of prompt/answer pairs or of messages as Python values."""
    import pyarrow as pa

    for setting, column in spec.content.items():
        kind = rows[column].type
        if spec.messages and not (pa.types.is_null(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise UserError(f"{spec.setting(setting)}={column}: in {where} it holds {kind}, not a list of messages with role "
                            "and content; set prompt_column and answer_column for plain pairs")
        if not spec.messages and not _is_text(kind):
            raise UserError(f"{spec.setting(setting)}={column}: in {where} it holds {kind}, not text")
    tools = [spec.tools] if spec.tools in rows.column_names else []
    return {column: rows[column].to_pylist() for column in [*spec.content.values(), *tools]}


def _fits(text: str, spec: Spec) -> bool:
    size = sum(len(said(message)) for message in read_document(text)[0]) if spec.pairs else len(text)
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
