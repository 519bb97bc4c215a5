"""The one exception that means "the user can mend this": shown as a single line, without a traceback."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from genscale.masking import masked
from genscale.printable import printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LONGEST = 4000
"""Characters of a message: more than any that genscale makes of names and paths that a system takes."""


class UserError(Exception):
    """A wrong setting, path or file. Its message is one line: the key, the value, the reason, the nearest allowed setting;
    no password or token, and nothing that a terminal would obey.

    Attributes:
        alone: this process is known to be the one to say it; else it leaves that to rank 0, which has the same error as a rule.
    """

    alone = False

    def __init__(self, message: str) -> None:
        line = printable(as_utf8(masked(" ".join(str(message).split()))))
        if len(line) > LONGEST:  # of a stranger's file, whose names and values may be as long as they please
            line = f"{line[:LONGEST // 2]} ... {line[-LONGEST // 2:]}"
        super().__init__(line)


_NO_UTF8 = re.compile("[\ud800-\udfff]")


def is_utf8(name: str) -> bool:
    """Whether a name that the system gave can be written as it is."""
    return _NO_UTF8.search(name) is None


def as_utf8(name: str) -> str:
    """The name with \\xNN in the place of bytes that are no UTF-8."""
    return name if name.isascii() else _NO_UTF8.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", name)


class SourceLost(UserError):
    """The server of a run's data or of a reward, or the hub, has not answered for as long as the run waits; nothing is wrong
    with the run."""


class UnfitNode(UserError):
    """This node, or the software on it, is not fit to train on; nothing is wrong with the run."""


class PortTaken(UserError):
    """Another program listens where the processes are to meet; nothing is wrong with the run."""


class CheckpointNotWritten(UserError):
    """A run's last checkpoint, or a reward, found no room, or its disk failed; nothing is wrong with the run."""


def shortened(value: str) -> str:
    """What is left of a value in a message: its beginning, where it is long."""
    return value if len(value) <= 80 else f"{value[:60]}... ({len(value):,} characters)"


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the other choice closest to `word`, or an empty string when none is close."""
    found = difflib.get_close_matches(word, [choice for choice in choices if choice != word], n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def nearest_divisors(number: int, wanted: int) -> str:
    """`"4 or 6"`: the two divisors of `number` that are closest to `wanted`."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return " or ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])))


def refuse_unheeded(section: str, settings: DataclassInstance, names: Iterable[str], beside: str) -> None:
    """Raises UserError for the first of these settings that is not its default: it would have no effect.

    Args:
        section: of the config.
        names: the settings that have none.
        beside: the setting that leaves them without.
    """
    plain = {field.name: field.default if field.default_factory is MISSING else field.default_factory()
             for field in fields(settings)}
    for name in names:
        if (value := getattr(settings, name)) != plain[name]:
            raise UserError(f"{section}.{name}: {value} has no effect with {beside}; leave it out")
