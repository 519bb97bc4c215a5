"""Labels as numbers of named classes.

A label is a name first: the text or the number that the source has for an image is looked for among the names of the classes,
a number also where it is spelt otherwise there ("01", "1.0"). Only where no class is called by a number does one count them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from genscale.errors import UserError, nearest

Label = int | str | None
MOST_CLASSES = 100_000
"""With more it is taken for a mistake, as a column of measurements is (ImageNet-21k has 21,841)."""
WHOLE = re.compile(r"([+-]?\d{1,18})(\.0*)?")
SHOWN = 12


def composed(name: str) -> str:
    """A name with each letter and its accents as one character: macOS writes them as several, others as one (NFC)."""
    return unicodedata.normalize("NFC", name)


def label_of(value: Any) -> Label:
    """A source's value as a text or a whole number; None where there is none. (What can be neither stays, to be named.)"""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")  # by replacements alone, names would be the same
    if isinstance(value, str):
        return composed(value) or None
    if isinstance(value, (float, Decimal)):
        number: Any = value
        if number != number:
            return None
        return int(number) if abs(number) < 2**53 and number == int(number) else number
    return value


def number_in(label: Any) -> int | None:
    """The whole number that a label is or spells."""
    if isinstance(label, str):
        spelt = WHOLE.fullmatch(label)
        return int(spelt[1]) if spelt else None
    return int(label) if isinstance(label, int) else None


class Classes:
    """The classes of a source, numbered in the order of their names.

    Args:
        where: the source, as `key=value`, for messages.

    Raises:
        UserError: two of the same name, or too many.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        self.names, self._where = [composed(name) for name in names], where
        if len(self.names) > MOST_CLASSES:
            raise _too_many(len(self.names), where)
        if len(self._numbers) < len(self.names):
            twice = next(name for number, name in enumerate(self.names) if name in self.names[:number])
            raise UserError(f"data.class_names: two classes of {where} are called {twice}; give each a name of its own")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    @cached_property
    def _values(self) -> dict[int, list[int]]:
        """The classes that are called by each number."""
        found: dict[int, list[int]] = {}
        for number, name in enumerate(self.names):
            if (value := number_in(name)) is not None:
                found.setdefault(value, []).append(number)
        return found

    def number(self, label: Label, of: str) -> int:
        """The number of the class that a label, as `label_of` gives it, stands for.

        Args:
            of: what bears the label.

        Raises:
            UserError: none of the classes, or several.
        """
        for name in (str(label), str(label).lower()) if isinstance(label, bool) else (str(label),):
            if label is not None and name in self._numbers:
                return self._numbers[name]
        value = number_in(label)
        if value is not None and self._values:
            if len(same := self._values.get(value, [])) == 1:
                return same[0]
            if same:
                names = " or ".join(self.names[number] for number in same)
                raise UserError(f"{self._where}: {of} has the label {label}, which may be the class {names}; set "
                                "data.class_names so that only one is called by that number")
        elif value is not None and 0 <= value < len(self.names):
            return value
        raise self._unknown(label, of)

    def _unknown(self, label: Any, of: str) -> UserError:
        if label is None:
            return UserError(f"data.labels=true: {of} of {self._where} has no label; label it, or set data.labels to false")
        if not isinstance(label, (int, str)):
            return _no_label(label, of, self._where)
        shown = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
        named = isinstance(label, int) and 0 <= label < len(self.names)
        reason = " (where classes are called by numbers, a number is a name and does not count them)" if named else ""
        if isinstance(label, int) and not self._values:
            reason = f" (a number counts them, from 0 to {len(self.names) - 1})"
        near = "" if named else nearest(str(label), self.names)
        return UserError(f"{self._where}: {of} has the label {label!r}, which is none of the {len(self.names)} classes "
                         f"{shown}{near}{reason}; mend it, or set data.class_names")


def classes_of(labels: Sequence[Label], names: Iterable[str], where: str) -> Classes:
    """The classes that these labels stand for: their sorted texts, or all numbers up to the largest.

    Args:
        names: what bears them.

    Raises:
        UserError: one is no label or is missing, or the classes are too many.
    """
    for label, name in zip(labels, names, strict=True):
        if label is None:
            missing = sum(label is None for label in labels)
            raise UserError(f"data.labels=true: not all images of {where} have a label: {missing:,} of {len(labels):,} have "
                            f"none, the first is {name}; label them, or set data.labels to false")
        if not isinstance(label, (int, str)):
            raise _no_label(label, name, where)
    known = [label for label in labels if label is not None]  # all of them
    if not all(isinstance(label, int) for label in known):
        return Classes(sorted({label if isinstance(label, str) else str(int(label)) for label in known}), where)
    numbers = sorted({int(label) for label in known})
    if numbers and numbers[0] >= 0:
        if numbers[-1] >= MOST_CLASSES:
            raise _too_many(numbers[-1] + 1, where, f" (the largest label is {numbers[-1]}, and {len(numbers):,} differ)")
        numbers = list(range(numbers[-1] + 1))
    return Classes([str(number) for number in numbers], where)


def _too_many(count: int, where: str, why: str = "") -> UserError:
    return UserError(f"data.labels=true: the labels of {where} make {count:,} classes{why}, and {MOST_CLASSES:,} at most are "
                     "taken; set data.label_column to one that holds classes, data.class_names to the names, or data.labels to "
                     "false")


def _no_label(label: Any, of: str, where: str) -> UserError:
    shown = f"{label!r:.60}"
    return UserError(f"data.labels=true: {of} of {where} has the label {shown}, and a class is a whole number or a text; set "
                     "data.label_column to one that holds classes, or data.labels to false")


def numbered(labels: Sequence[Label], names: Iterable[str], classes: Classes) -> np.ndarray:
    """`(labels,)` int64. Raises UserError for the first that is none of the classes; `names` say what bears them."""
    found = (classes.number(label, name) for label, name in zip(labels, names, strict=True))
    return np.fromiter(found, np.int64, len(labels))


def uneven(names: Sequence[str], counts: np.ndarray) -> str | None:
    """What to say of classes that nothing, or hardly anything, can be learnt of; None where there are none.

    Args:
        counts: `(classes,)` images of each.
    """
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    if empty:
        shown = ", ".join(empty[:SHOWN]) + (", ..." if len(empty) > SHOWN else "")
        return (f"{len(empty):,} of {len(names):,} classes have no image to train on: {shown}; data.class_names can name those "
                "that have")
    if len(names) > 1 and 2 * len(names) > counts.sum():
        return (f"the {counts.sum():,} images to train on are of {len(names):,} classes, most with one image; are these labels "
                "classes?")
    return None
