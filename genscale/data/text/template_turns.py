"""Which message wrote which characters of a chat template's text: the template's loops tell of their turns, and what makes long
values tells of these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator


class Turn(dict):
    """A message that knows its number in the conversation. (Templates do not see attributes with an underscore.)"""

    _number: int

    @classmethod
    def numbered(cls, number: int, message: dict[str, Any]) -> Turn:
        turn = cls(message)
        turn._number = number
        return turn


class Rendering(threading.local):
    """What is known of the rendering that a thread is at.

    Attributes:
        position: characters written so far.
        shown: number of a message -> the stretches (start, stop) that were written in its turns of a loop.
        inner: (number of a message, start, stop) of those that lie inside another message's.
        last: where the last such turn ended.
        generated: what the template itself marks as the assistant's.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.position = self.last = 0
        self.shown: dict[int, list[tuple[int, int]]] = {}
        self.inner: list[tuple[int, int, int]] = []
        self.generated: list[tuple[int, int]] = []
        self._open: dict[int, tuple[int, int]] = {}
        self._counting: set[int] = set()

    def enter(self, loop: int, item: Any) -> None:
        self.leave(loop)
        if type(item) is Turn:
            self._open[loop] = item._number, self.position
        else:
            self._counting.add(loop)

    def choose(self, loop: int, item: Any) -> None:
        """The first message that a variable is set to in a turn of a loop over numbers is what the turn is about."""
        if type(item) is Turn and loop in self._counting:
            self._counting.discard(loop)
            self._open[loop] = item._number, self.position

    def leave(self, loop: int) -> None:
        self._counting.discard(loop)
        if loop in self._open:
            number, start = self._open.pop(loop)
            self.last, around = self.position, {other for other, _ in self._open.values()}
            if self.position > start and number not in around:
                self.shown.setdefault(number, []).append((start, self.position))
                self.inner += [(number, start, self.position)] if around else []


def instrument(node: nodes.Node, numbers: Iterator[int], written: bool, loop: int | None = None) -> None:
    """Let every loop tell the environment of its turns, and of what a variable is set to in them.

    Args:
        numbers: for the loops.
        written: whether what stands here goes straight into the text. What is kept in a variable, or is a macro's, may be
            written anywhere: which message it is of is not asked.
        loop: the loop that this stands in.
    """
    written = written and not isinstance(node, (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock))
    for _, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [part for child in value for part in _instrumented(child, numbers, written, loop)]
        elif isinstance(value, nodes.Node):
            instrument(value, numbers, written, loop)


def _instrumented(child: Any, numbers: Iterator[int], written: bool, loop: int | None) -> list[Any]:
    if isinstance(child, nodes.For):
        number, written = next(numbers), written and not child.recursive
        name = child.target.name if written and isinstance(child.target, nodes.Name) else None
        tracked = name is not None
        instrument(child, numbers, written, number if tracked else None)
        child.body.insert(0, _call("enter", number, name))
        return [child, _call("leave", number)] if tracked else [child]
    if isinstance(child, nodes.Node):
        instrument(child, numbers, written, loop)
    if isinstance(child, nodes.Assign) and written and loop is not None and isinstance(child.target, nodes.Name):
        return [child, _call("choose", loop, child.target.name)]
    return [child]


def _call(method: str, loop: int, name: str | None = None) -> nodes.ExprStmt:
    """`environment.method(loop, name)`, as the sandbox's generator writes it."""
    items = [nodes.Const(method), nodes.Const(loop), *([nodes.Name(name, "load")] if name else [])]
    return nodes.ExprStmt(nodes.Tuple(items, "load"), lineno=1)


class Generator(CodeGenerator):
    """Compiles what makes long values, and every turn of a loop, so that the environment hears of it."""

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Any) -> None:  # only `instrument` makes them
        parts = cast(nodes.Tuple, node.node).items
        (method, loop), names = cast(list[nodes.Const], parts[:2]), parts[2:]
        self.writeline(f"environment.{method.value}({loop.value}", node)
        for name in names:
            self.write(", ")
            self.visit(name, frame)
        self.write(")")

    def _within(self, call: str, visit: Callable[..., None], node: nodes.Node, frame: Any) -> None:
        self.write(f"environment.{call}(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._within("bounded", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._within("bounded", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._within("bounded", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._within("bounded", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(")
        self._within("looked_at", self.visit, node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        self.write(f" {jinja2.compiler.operators[node.op]} ")
        self._within("looked_at", self.visit, node.expr, frame)
