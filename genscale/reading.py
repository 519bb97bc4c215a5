"""JSON and YAML of files that somebody else may have written: read in bounded time and memory, or refused in one line.

Only plain files are opened (a named pipe would be waited for), up to a size, and what is in them may be nested so deep and no
deeper. A key that is given twice is refused, since the first value would be lost without a word.

YAML is that of version 1.2 (https://yaml.org/spec/1.2.2, section 10.3), where `010` is ten, `1e-3` a number, `1:30` a text and
`off` another, read everywhere by one loader; PyYAML's own speak version 1.1. What `dump_yaml` writes, either reads back equal.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

MAX_JSON_BYTES = 2**26
"""An index of a model's tensors has megabytes."""
MAX_YAML_BYTES = 2**22
MAX_DEPTH = 64
"""Levels of lists and mappings, one in the other."""
MAX_VALUES = 200_000
"""Most values of a YAML file: a second or two of reading."""
MAX_DIGITS = 4000
"""Most digits of a whole number in a YAML file; Python's own limit is a little more."""
MAX_REPEATED = 10_000
"""Values that the aliases of a YAML file may stand for in all."""
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Unreadable(ValueError):
    """A file, or a text, that is not read: its message says in one line why."""


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """The content of a plain file of at most `limit` bytes.

    Raises:
        OSError: it cannot be read.
        Unreadable: it is larger, or no plain file.
    """
    with open_plain(path) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise Unreadable(f"has more than the {limit:,} bytes that are read of such a file")
    return content


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, to be read piece by piece. Raises as `read_bytes`."""
    _check_plain(os.stat(path), path)  # before it is opened: to open a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_plain(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_plain(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"is {KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}, not a plain file")


def read_text(path: str | Path, limit: int | None = None) -> str:
    """The text of a plain file, which must be UTF-8, without a byte order mark. Raises as `read_bytes`."""
    content = read_bytes(path, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"no text (byte {error.start})"
        raise Unreadable(f"is {kind}, not UTF-8; save it as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path, MAX_JSON_BYTES))


def parse_json(text: str, strictly: bool = False) -> Any:
    """What a JSON text says. Raises Unreadable: it is no JSON, nested too deep, or gives a key two values.

    Args:
        strictly: NaN and Infinity, which Python reads and writes, are no JSON.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number if strictly else None)
    except RecursionError:
        raise Unreadable(_too_deep()) from None
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"is not valid JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and deeper(content, MAX_DEPTH):
        raise Unreadable(_too_deep())
    return content


def deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings lie inside each other more than `limit` levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        level = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent)
                 if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _no_number(word: str) -> Any:
    raise Unreadable(f"is not valid JSON: {word} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise Unreadable(f"gives the key {key!r} two values")
    return content


def _too_deep() -> str:
    return f"is nested more than {MAX_DEPTH} levels deep"


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds; None for an empty one. Raises as `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path, MAX_YAML_BYTES))


def parse_yaml(text: str) -> Any:
    """What a YAML 1.2 text says: nothing but texts, numbers, true, false, null, lists and mappings.

    Raises:
        Unreadable: it is no YAML, gives a key twice, has a tag of something else, is nested too deep, or has aliases that
            stand for too much.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ": ".join(filter(None, (error.context if error.problem == "second occurrence" else None, error.problem)))
        raise Unreadable(f"is not valid YAML: {where}{what or error.context}") from error
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise Unreadable(f"is not valid YAML: {' '.join(str(error).split())[:200]}") from error


def dump_yaml(content: Any, **options: Any) -> str:
    """The content as YAML, its keys in order. Reads back equal, by `parse_yaml` and by readers of YAML 1.1."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, **options)


_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
              list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}
"""What a plain scalar is; whatever else is text. Merging is no part of 1.2, and in use everywhere."""
_TAG = "tag:yaml.org,2002:"
# libyaml scans, where it is there; nodes are made here, one event at a time, so that nothing is recursed into unseen.
_EVENTS: tuple[Any, ...] = (yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser)
if yaml.__with_libyaml__:
    _EVENTS = (yaml.cyaml.CParser,)  # type: ignore[attr-defined]


class _Loader(yaml.composer.Composer, *_EVENTS, yaml.constructor.SafeConstructor, yaml.resolver.BaseResolver):
    def __init__(self, text: str) -> None:
        for base in _EVENTS[:2]:  # of Reader and Scanner, both
            base.__init__(self, *([text] if base is _EVENTS[0] else []))
        if len(_EVENTS) > 1:
            yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.constructor.SafeConstructor.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)
        self._depth, self._repeated = 0, 0
        self._sizes: dict[int, tuple[int, int]] = {}  # of finished nodes: values in them, levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise Unreadable(_too_deep())
        node = super().compose_node(parent, index)
        assert node is not None  # there was an event
        self._depth -= 1
        if is_alias:
            if id(node) not in self._sizes:
                raise Unreadable(f"is not valid YAML: line {mark.line + 1}: an alias stands for what it is a part of")
            self._repeated += self._sizes[id(node)][0]
            if self._repeated > MAX_REPEATED:
                raise Unreadable(f"has aliases (*name) that stand for more than {MAX_REPEATED:,} values")
        else:
            if len(self._sizes) >= MAX_VALUES:
                raise Unreadable(f"has more than {MAX_VALUES:,} values")
            sizes = [self._sizes[id(child)] for child in _nodes(node)]
            self._sizes[id(node)] = 1 + sum(size for size, _ in sizes), 1 + max((levels for _, levels in sizes), default=0)
        if self._depth + self._sizes[id(node)][1] > MAX_DEPTH:
            raise Unreadable(_too_deep())
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, yaml.Node] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            same = first.setdefault((key.tag, self.construct_object(key)), key)
            if same is not key:
                lines = [each.start_mark.line + 1 for each in (same, key)]
                where = f"lines {lines[0]} and {lines[1]}" if lines[0] != lines[1] else f"line {lines[0]}"
                raise Unreadable(f"gives the key '{key.value}' twice, in {where}; leave one out")
        return node


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that either version would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML reads line breaks of Unicode otherwise than it writes them, but for those that it writes as escapes.
        return self.represent_scalar(_TAG + "str", data, style='"' if re.search("[\x85\u2028\u2029]", data) else None)


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    value = loader.construct_scalar(node)
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{value} is neither true nor false")
    return value.lower() == "true"


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    value = loader.construct_scalar(node)
    if len(value) > MAX_DIGITS:
        raise ValueError(f"a number has {len(value):,} digits, and at most {MAX_DIGITS:,} are read")
    return int(value[2:], {"0o": 8, "0x": 16}[value[:2]]) if value[:2] in ("0o", "0x") else int(value)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", loader.construct_scalar(node)))


for _name, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _first)
_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.yaml_constructors = {tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items()
                             if tag is None or tag in {_TAG + name for name in ("null", "str", "seq", "map")}}
for _name, _construct in (("bool", _construct_bool), ("int", _construct_int), ("float", _construct_float),
                          ("merge", yaml.SafeLoader.construct_yaml_str)):
    _Loader.add_constructor(_TAG + _name, _construct)
