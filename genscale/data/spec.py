"""What to read from a source: its columns, and the conditions that a row must fulfil."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from genscale.data.left_out import LeftOut
from genscale.errors import UserError, nearest
from genscale.plugins import Plugins

COMPARISONS = {">=": "greater_equal", "<=": "less_equal", "!=": "not_equal", "==": "equal", ">": "greater", "<": "less"}
COMPARISON = re.compile(r"(>=|<=|!=|==|>|<)\s*(.*)", re.DOTALL)


ANSWER_ROLES = ("assistant",)
TOOLS = "tools"
SOURCES = Plugins("genscale.data", "data.source", "data source")
"""Those of installed packages: classes that inherit from `genscale.RowSource`."""
SUMS = "sums"
"""What `data.source` calls `genscale.data.made_sums`."""


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
        answer_roles: roles of messages that are answers.
        tools: column of the tools of a conversation, in which the name `TOOLS` need not be there.
        beside: columns that travel with a prompt whose answer is not in the data; None where documents are no such prompts.
        bad_share: see `TextDataSettings`.
        shortest, longest: characters of the documents that are read.
        retry_minutes: how long a server that fails is tried again.
        options: settings of an installed source, as they stand in the config.
        max_record_bytes: the longest row, line, paragraph or file that is held in memory as a whole, decompressed.
        left_out: what this process has left out of the source.
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
    answer_roles: tuple[str, ...] = ANSWER_ROLES
    tools: str | None = None
    beside: tuple[str, ...] | None = None
    bad_share: float = 0.01
    shortest: int = 0
    longest: int | None = None
    retry_minutes: float = 5.0
    max_record_bytes: int = 256 * 2**20
    options: Any = field(default=None, compare=False)
    left_out: LeftOut = field(default=cast(LeftOut, None), compare=False, repr=False)  # there from `__post_init__` on
    local_advice: ClassVar[str] = ("give the path of a local file or folder (.txt, .jsonl, .parquet), python-stdlib or "
                                   "python-docs")

    def __post_init__(self) -> None:
        if self.left_out is None:  # one that is made of another counts with it
            roles = f"{self.setting('answer_roles')}={list(self.answer_roles)}"
            kind = "conversations cannot be learnt from" if self.beside is None else "prompts cannot be asked"
            object.__setattr__(self, "left_out", LeftOut(f"{self.key}={self.name}", self.bad_share, roles, kind))

    def setting(self, name: str) -> str:
        """Full key of another setting of the same entry."""
        return f"{self.key.rpartition('.')[0]}.{name}"

    @property
    def pairs(self) -> bool:
        """Whether the documents are prompts, or prompt/answer pairs: JSON each, never to be cut."""
        return bool(self.messages or self.prompt or self.beside is not None)

    @property
    def content(self) -> dict[str, str]:
        """Setting -> column of what a document is made of."""
        if self.messages:
            return {"messages_column": self.messages}
        if self.beside is not None:
            return {"prompt_column": self.prompt or self.column}
        if not self.prompt:
            return {"column": self.column}
        return {"prompt_column": self.prompt, "answer_column": cast(str, self.answer)}

    @property
    def columns(self) -> list[str]:
        """Every column that is looked at; that of the tools only where it is there."""
        tools = [self.tools] if self.messages and self.tools else []
        return list(dict.fromkeys([*self.content.values(), *(self.beside or ()), *(rule.column for rule in self.filters),
                                   *tools]))

    def unknown_columns(self, where: str, columns: Sequence[str]) -> UserError | None:
        """The error for a column that `where` does not have, or that several have the name of."""
        tools = {"tools_column": self.tools} if self.messages and self.tools not in (None, TOOLS) else {}
        named = [*self.content.items(), *(("columns", column) for column in self.beside or ()), *tools.items(),
                 *((f"filters.{rule.column}", rule.column) for rule in self.filters)]
        for setting, column in named:
            if columns.count(column) > 1:
                return UserError(f"{self.setting(setting)}={column}: {where} of {self.key}={self.name} has "
                                 f"{columns.count(column)} columns of that name; rename them, or name another column")
            if column not in columns:
                purposes = {"filters": "of the filter", "tools_column": "of the tools", "columns": "that rewards read"}
                purpose = purposes.get(setting.partition(".")[0], "that holds the text")
                return UserError(f"{self.setting(setting)}={column}: {where} of {self.key}={self.name} has the columns "
                                 f"{', '.join(columns)}{nearest(column, columns)}; set {self.setting(setting)} to the one "
                                 f"{purpose}")
        return None


def is_installed(name: str) -> bool:
    """Whether this value of `data.source` names an installed source. (Looking through what is installed takes its time.)"""
    return re.fullmatch(r"[\w-]+", name) is not None and name in SOURCES


AnySpec = TypeVar("AnySpec", bound=Spec)


def with_options(spec: AnySpec) -> AnySpec:
    """The spec as it is. Raises UserError where its options are no installed source's."""
    if spec.options is not None and not any(map(is_installed, spec.locations or [spec.name])):
        raise UserError(f"{spec.setting('options')}: {spec.options} are for a source of an installed package "
                        f"({SOURCES.unknown(spec.name)}); leave them out, or install it")
    return spec


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
                compared = COMPARISON.match(part)
                if compared is None:
                    raise UserError(f"{where}: {part!r} is no comparison; {advice}")
                sign, text = compared.groups()
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
    for kind in (int, float) if text.isascii() and "_" not in text else ():  # which Python alone would read
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), text)
