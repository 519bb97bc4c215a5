"""A sandbox for the chat templates of strangers: it bounds what they do.

Jinja's own sandbox keeps a template from what it must not see; that it ends, and does not fill the memory, is seen to here. All
bounds are counts, no clocks: whether a conversation is refused must not depend on the machine.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from genscale.data.text.template_turns import Generator, Rendering, Turn, instrument

WORK = 1_000_000
"""Turns of loops and calls in a rendering, beyond what a long conversation takes."""
CHARACTERS = 64
"""So many that are handled count as a turn."""
LARGEST = 2**23
"""Characters of one text, beyond some times the conversation."""
VALUE = 32
"""A text or list in a list counts as so many characters more than its own."""
SOURCE = 2**18
"""Characters of a template: ten times the longest that is published."""
BITS = 2**14
GROWING = {"center", "indent", "batch", "slice", "tojson", "wordwrap", "urlize", "xmlattr", "join", "pprint", "format"}
"""Filters whose result may be as long as their arguments multiplied."""
COMPARING = ("eq", "==", "equalto", "ne", "!=", "in", "lt", "<", "le", "<=", "gt", ">", "ge", ">=", "lower", "upper")


class TooMuch(jinja2.TemplateError):
    """A template that works more, or writes more, than any chat template has to."""


class Budget(threading.local):
    """What the rendering that a thread is at may still do.

    Attributes:
        left: turns of loops and calls.
        largest: characters of a text.
    """

    def __init__(self) -> None:
        self.begin(0, 0)

    def begin(self, size: int, messages: int) -> None:
        # Templates look back and ahead from each message.
        self.left, self.largest = WORK + size + 4 * messages * min(messages, 1000), LARGEST + 8 * size


class _Generation(Extension):
    """`{% generation %}`: where a template itself says what the assistant's part is, as transformers has it."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        cast(Sandbox, self.environment).marks_answers = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        block.set_lineno(line)
        return block

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        rendering = cast(Sandbox, self.environment).rendering
        start, text = rendering.position, caller()
        rendering.generated.append((start, start + len(text)))
        return text


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with bounds.

    Attributes:
        rendering: of the thread.
        marks_answers: whether a template that it has read has `{% generation %}`.
    """

    code_generator_class = Generator
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.rendering, self._budget, self.marks_answers = Rendering(), Budget(), False
        # Not `random`: the same conversation must be the same text at every epoch and resume.
        self.filters = {name: self._bounded_filter(name, call) for name, call in self.filters.items() if name != "random"}
        self.tests.update({name: self._bounded_filter(name, cast(Callable[..., Any], self.tests[name])) for name in COMPARING})
        del self.globals["lipsum"]
        self.globals["dict"] = _dict  # the class has methods that change messages
        self.finalize = self._shown

    def add_filter(self, name: str, call: Callable[..., Any]) -> None:
        """A filter, bounded as the others are."""
        self.filters[name] = self._bounded_filter(name, call)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters, more than {SOURCE:,}")
        template = super()._parse(source, name, filename)
        instrument(template, iter(range(len(source))), True)
        return template

    def write(self, template: jinja2.Template, size: int, variables: dict[str, Any]) -> str:
        """The template's text; `rendering` then tells what stands where.

        Args:
            size: characters of what is rendered.

        Raises:
            TooMuch: a bound is passed.
        """
        self.rendering.begin()
        self._budget.begin(size, len(variables["messages"]))
        pieces = []
        for piece in template.generate(**variables):
            pieces.append(piece)
            self.rendering.position += len(piece)
            self._spend(len(piece))
        return "".join(pieces)

    def _spend(self, size: int) -> None:
        budget = self._budget
        budget.left -= 1 + size // CHARACTERS
        if budget.left < 0:
            raise TooMuch(f"it does not come to an end within {WORK:,} turns of its loops and calls")
        if size > budget.largest or self.rendering.position > budget.largest:
            raise TooMuch(f"it writes more than {budget.largest:,} characters")

    def _promise(self, size: int) -> None:
        """Refuse what would be too long, before it is made."""
        if size > self._budget.largest:
            raise TooMuch(f"it makes a text or list of {size:,}, more than {self._budget.largest:,}")

    def enter(self, loop: int, item: Any = None) -> None:
        self._spend(0)
        self.rendering.enter(loop, item)

    def choose(self, loop: int, item: Any) -> None:
        self.rendering.choose(loop, item)

    def leave(self, loop: int) -> None:
        self.rendering.leave(loop)

    def bounded(self, value: Any) -> Any:
        """The value, where it is not too large."""
        self._spend(len(value) if type(value) is str else _size(value, self._budget.largest))
        return value

    def looked_at(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)) and len(value) > CHARACTERS:
            self._spend(len(value))
        return value

    @jinja2.pass_context  # or constants would be put together while compiling, without bounds
    def _shown(self, _: Any, value: Any) -> Any:
        return value if type(value) is str else self.bounded(value)

    def joined(self, parts: tuple[Any, ...]) -> str:
        return self.bounded("".join([part if type(part) is str else str(self.bounded(part)) for part in parts]))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if type(left) is str and type(right) is str:
                self._spend(len(left) + len(right))
                return left + right
        elif operator == "%":
            if isinstance(left, str):
                self._check_widths(left)
                self.bounded(right)
        else:
            self._check_product(operator, left, right)
        return self.bounded(super().call_binop(context, operator, left, right))

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise TooMuch(f"it makes a number of more than {BITS:,} bits")
        elif operator == "*":
            value, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                self._promise(_size(value, self._budget.largest) * times)

    def _check_widths(self, pattern: str) -> None:
        if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*\{", pattern):
            raise TooMuch("it formats a text to a width of 10,000 characters or one that is made up")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if wrapped := super().wrap_str_format(value):
            self._check_widths(value.__self__)
        return wrapped

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        __self._spend(sum(_size(value, __self._budget.largest) for value in given))
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)) and given:
            __self._check_method(owner, name, given)
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def _check_method(self, owner: Any, name: str, given: list[Any]) -> None:
        """The methods of texts and numbers whose result is longer than what they are given."""
        length = len(owner) if isinstance(owner, (str, bytes)) else 1
        if name in ("center", "ljust", "rjust", "zfill", "to_bytes"):
            self._promise(max(value for value in given if isinstance(value, int)) if isinstance(given[0], int) else 0)
        elif name == "expandtabs" and isinstance(given[0], int):
            self._promise(length * given[0])
        elif name == "replace" and len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
            self._promise(length + (owner.count(given[0]) * len(given[1]) if len(given[1]) > 1 else 0))
        elif name in ("join", "translate"):
            self._promise((length + 1) * _size(given[0], self._budget.largest) if length > 1 or name == "translate" else 0)

    def _bounded_filter(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        own = hasattr(call, "jinja_pass_arg")  # its first argument is jinja's

        @functools.wraps(call)
        def checked(*args: Any, **kwargs: Any) -> Any:
            first, *rest = [*args[own:], *kwargs.values()] or [None]
            size = _size(first, self._budget.largest)
            self._spend(size + sum(_size(value, self._budget.largest) for value in rest))
            if name in GROWING:
                factors = [value if isinstance(value, int) else _size(value, self._budget.largest) for value in rest]
                self._promise(max(size, 1) * max([*factors, 1]))
            if name == "format":
                self._check_widths(str(first))
            elif name == "replace" and len(rest) > 1:
                self._promise(size + str(first).count(str(rest[0])) * len(str(rest[1])))
            elif name == "sum" and any(isinstance(value, (list, tuple)) for value in rest):
                raise TooMuch("it adds up lists")
            result = call(*args, **kwargs)
            return result if isinstance(result, (bool, Iterator)) else self.bounded(result)
        return checked


def _dict(*items: Any, **named: Any) -> dict[Any, Any]:
    return dict(*items, **named)


def _size(value: Any, most: int) -> int:
    """Characters that a value is made of, or a little more than `most`. Messages count as one: they are as they came, and
    nothing in them was made by the template."""
    if isinstance(value, str):
        return len(value)
    size, rest = 1, [value]
    while rest and size <= most:
        each = rest.pop()
        if type(each) in (list, tuple, set):
            parts = each
        elif type(each) is dict:
            parts = [*each, *each.values()]
        elif isinstance(each, Namespace):
            parts = each._Namespace__attrs.values()  # no other way to them
        else:
            size += VALUE + (len(each) if isinstance(each, (str, bytes)) else 0)
            continue
        size += VALUE + 8 * len(parts)
        rest.extend(part for part in parts if type(part) not in (Turn, int, bool, float))
    return size
