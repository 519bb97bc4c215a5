"""Labels as numbers of named classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from genscale.errors import UserError, nearest

Label = int | str | None


class Classes:
    """The classes of a source, numbered in the order of their names.

    Args:
        where: the source, as `key=value`, for messages.
    """

    def __init__(self, names: Sequence[str], where: str) -> None:
        self.names, self._where = list(names), where

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def number(self, label: Label, of: str) -> int:
        """The number of a class, given by number or by name.

        Args:
            of: what bears the label.

        Raises:
            UserError: none of the classes.
        """
        if isinstance(label, str):
            label = self._numbers.get(label, int(label) if label.isdecimal() else label)
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if label is None:
            raise UserError(f"data.labels=true: {of} of {self._where} has no label; label it, or set data.labels to false")
        shown = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
        raise UserError(f"{self._where}: {of} has the label {label!r}, which is none of the {len(self.names)} classes {shown}"
                        f"{nearest(str(label), self.names)}; mend it, or set data.class_names")


def classes_of(labels: Sequence[Label], where: str) -> Classes | None:
    """The classes that these labels stand for: their sorted texts, or all numbers up to the largest; None where one has no
    label."""
    if any(label is None for label in labels):
        return None
    if all(isinstance(label, int) for label in labels):
        return Classes([str(number) for number in range(max(labels, default=-1) + 1)], where)
    return Classes(sorted({str(label) for label in labels}), where)


def numbered(labels: Sequence[Label], names: Sequence[Label], classes: Classes) -> np.ndarray:
    """`(labels,)` int64. Raises UserError for the first that is none of the classes; `names` say what bears them."""
    found = (classes.number(label, name) for label, name in zip(labels, names, strict=True))
    return np.fromiter(found, np.int64, len(labels))
