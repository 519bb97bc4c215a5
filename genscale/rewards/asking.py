"""How a judge is asked: what it says must be numbers, and one that fails is asked again before the run ends by its name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from genscale.errors import UserError

log = logging.getLogger("genscale")
TRIES = 3
"""How often a judge is asked that fails."""
T = TypeVar("T")


class NoJudgement(Exception):
    """A judge gave none, or something else; in a line."""


def insist(ask: Callable[[], T], who: str, again: Callable[[], object] = lambda: None) -> T:
    """What `ask` gives, asked up to `TRIES` times.

    Args:
        who: is asked, for messages.
        again: to be called before the second and third time.

    Raises:
        UserError: of `ask`, at once; or what it has failed with each time.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return ask()
        except UserError:
            raise
        except Exception as error:  # whatever a judge does
            why = _why(error)
            if attempt == TRIES:
                raise UserError(f"{who}: {why}; asked {TRIES} times; mend it and start the run again, and it goes on from its "
                                "latest checkpoint") from error
            log.warning("%s: %s; it is asked again, %d of %d", who, why, attempt, TRIES - 1)
            again()
    raise AssertionError


def _why(error: Exception) -> str:
    if isinstance(error, NoJudgement):
        return str(error)
    place, trace = "", error.__traceback__
    while trace is not None:  # where it was raised: somebody else's code is to be mended
        place, trace = f" in {trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}", trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


def numbers(values: Any, count: int) -> list[float]:
    """What a judge gave, as a finite number for each that it was asked about. Raises NoJudgement.

    >>> numbers((1, True, 0.5), 3)
    [1.0, 1.0, 0.5]
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        found = [_number(value) for value in ([values] if isinstance(values, (str, bytes, Mapping)) else values)]
    except (TypeError, ValueError, OverflowError):
        raise NoJudgement(f"gave {values!r:.80}, not a number for each of {count}") from None
    if len(found) != count:
        raise NoJudgement(f"gave {len(found)} numbers for {count}")
    for index, number in enumerate(found):
        if not math.isfinite(number):
            raise NoJudgement(f"gave {number}, for number {index + 1} of {count}")
    return found


def _number(value: Any) -> float:
    """Raises TypeError for a text, even one that reads like a number."""
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)
