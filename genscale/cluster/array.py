"""An array of runs: one for each value of a setting, or for each combination of the values of several."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from genscale.errors import UserError

SHORTHANDS = {"seed": "run.seed"}
LARGEST_INDEX = 1000
"""Of an array's element, where a cluster has Slurm's own MaxArraySize."""
MOST = 10_000
_UNSAFE = "[^A-Za-z0-9._+-]"
"""In the name of a folder, as Python and bash read it alike."""


@dataclass(frozen=True)
class Axis:
    """A setting of the config, as run.seed, and its values."""

    key: str
    values: tuple[str, ...]

    @property
    def short(self) -> str:
        """The setting's last part, which the names of runs have before the value."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Array:
    """Runs that differ in some settings. An element is a tuple of values, one of each axis; the last axis changes first.

    Attributes:
        at_once: most that run at a time; 0: any number.
    """

    axes: tuple[Axis, ...]
    at_once: int = 0

    def elements(self) -> list[tuple[str, ...]]:
        return list(itertools.product(*(axis.values for axis in self.axes)))

    @property
    def is_range(self) -> bool:
        """Whether the values are whole numbers in a row, and small enough, to be their own indices."""
        values = self.axes[0].values
        first = int(values[0]) if values[0].isdecimal() else 0
        row = range(first, first + len(values))
        return len(self.axes) == 1 and row[-1] <= LARGEST_INDEX and values == tuple(map(str, row))

    def indices(self) -> list[int]:
        """Slurm's numbers of the elements, in their order."""
        return [int(value) for value in self.axes[0].values] if self.is_range else list(range(len(self.elements())))

    def for_sbatch(self) -> str:
        indices = self.indices()
        return f"{indices[0]}-{indices[-1]}" + (f"%{self.at_once}" if self.at_once else "")

    def name_of(self, name: str, element: Sequence[str]) -> str:
        """The name of the run with these values, in an array called `name`."""
        parts = (f"-{axis.short}{re.sub(_UNSAFE, '-', value)}" for axis, value in zip(self.axes, element, strict=True))
        return name + "".join(parts)

    def settings_of(self, element: Sequence[str]) -> dict[str, str]:
        """Value by setting."""
        return {axis.key: value for axis, value in zip(self.axes, element, strict=True)}

    def in_words(self, element: Sequence[str]) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings_of(element).items())

    def script(self, run: str, settings: Sequence[str]) -> list[str]:
        """Lines of a job's script that find `run`, its folder, and `settings`, which override the file's.

        Args:
            run: what the names of the run folders begin with.
            settings: which all of them have.
        """
        names = ["value"] if len(self.axes) == 1 else [f"value_{number}" for number in range(1, len(self.axes) + 1)]
        if self.is_range:
            lines = ["value=$SLURM_ARRAY_TASK_ID"]
        else:
            lines = []
            for number, (axis, name) in enumerate(zip(self.axes, names, strict=True)):
                step = math.prod(len(later.values) for later in self.axes[number + 1:])
                index = "SLURM_ARRAY_TASK_ID" + (f" / {step} % {len(axis.values)}" if len(self.axes) > 1 else "")
                plural = name.replace("value", "values")
                lines += [f"{plural}=({shlex.join(axis.values)})", f"{name}=${{{plural}[{index}]}}"]
        folder = shlex.quote(f"{run}-{self.axes[0].short}")
        for axis, name in zip(self.axes, names, strict=True):
            folder += ("" if axis is self.axes[0] else f"-{axis.short}") + f"${{{name}//{_UNSAFE}/-}}"
        own = [f'"--{axis.key}=${name}"' for axis, name in zip(self.axes, names, strict=True)]
        return [*lines, f"run={folder}", f"settings=({' '.join([*map(shlex.quote, settings), *own])})"]


def read_array(texts: Sequence[str]) -> Array | None:
    """From SETTING=VALUES for each setting; None where there is none. Raises UserError."""
    if not texts:
        return None
    axes, limits = [], []
    for text in texts:
        axis, limit = _axis(text)
        axes.append(axis)
        limits += [limit] if limit else []
    for key, others in itertools.groupby(sorted(axis.key for axis in axes)):
        if len([*others]) > 1:
            raise UserError(f"--array: {key} is named twice; write all of its values in one list")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST:
        raise UserError(f"--array: {' x '.join(str(len(axis.values)) for axis in axes)} are {count:,} runs; nearest allowed: "
                        f"{MOST:,}")
    return Array(tuple(axes), min(limits, default=0))


def _axis(text: str) -> tuple[Axis, int]:
    """And how many are to run at a time; 0 where it does not say."""
    match = re.fullmatch(r"(?P<key>[\w.]+)=(?P<values>.+?)(?:%(?P<at_once>\d+))?", text)
    if match is None:
        raise UserError(f"--array: '{text}' is not SETTING=VALUES, as seed=0-4, optimizer.lr=1e-3,3e-4 or optimizer.lr=@FILE")
    key, listed = SHORTHANDS.get(match["key"], match["key"]), match["values"]
    values = _from_file(listed[1:]) if listed.startswith("@") else listed.split(",")
    if span := re.fullmatch(r"(\d+)-(\d+)", listed):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= MOST:
            raise UserError(f"--array: {listed} is not a range of values, the lowest first, of at most {MOST:,}")
        values = [str(number) for number in range(first, last + 1)]
    if "" in values or len(set(values)) < len(values):
        raise UserError(f"--array: '{text}' names a value twice, or none between two commas")
    if odd := next((value for value in values if not value.isprintable()), None):
        raise UserError(f"--array: {odd!r} is not a value that a job's script can hold")
    if "." not in key or key in ("run.name", "run.dir", "run.resume"):
        raise UserError(f"--array: {key} is not a setting that runs of an array can differ in; as seed, or optimizer.lr")
    at_once = int(match["at_once"] or 0)
    if match["at_once"] and not at_once:
        raise UserError(f"--array: '{text}' lets none run at a time; write %1 or more")
    return Axis(key, tuple(values)), at_once


def _from_file(name: str) -> list[str]:
    """A value on each line; empty lines, and those after a #, are none."""
    try:
        lines = [line.strip() for line in Path(name).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"--array: cannot read '{name}' ({why})") from None
    values = [line for line in lines if line and not line.startswith("#")]
    if not values:
        raise UserError(f"--array: '{name}' has no values; write one on each line")
    return values
