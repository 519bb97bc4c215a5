"""What installed packages offer: entry points of a group, by name, and the package that each of them is of.

A config can only choose among what is installed; nothing is imported of a package of which nothing is chosen. What a run has
chosen stands in its checkpoints, so that who lacks the package is told what to install.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from genscale.errors import UserError, nearest

T = TypeVar("T")
PLAIN = re.compile(r"[\w./][\w.+!/-]*")
"""Names, versions and paths that can be typed as they are."""


@dataclass(frozen=True)
class Package:
    """An installed package.

    Example:
        >>> str(Package("genscale-rings", "1.2.0"))
        'genscale-rings==1.2.0'
    """

    name: str
    version: str
    summary: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Plugins:
    """What installed packages offer in one group of entry points.

    Attributes:
        group: the group of entry points, as "genscale.hooks".
        key: the setting that chooses among them, for messages.
        noun: what one of them is, for messages.

    Example:
        >>> "no-such-hook" in Plugins("genscale.hooks", "hooks", "hook")
        False
    """

    group: str
    key: str
    noun: str

    def names(self) -> list[str]:
        """The names of all that is installed, in alphabetical order."""
        return sorted(self._points())

    def __contains__(self, name: object) -> bool:
        return name in self._points()

    def package(self, name: str) -> Package | None:
        """The installed package that offers this; None where none does."""
        return _package(self._points()[name][0]) if name in self else None

    def origin(self, name: str) -> dict[str, str]:
        """What a checkpoint records of one: its name, package and version; empty where it is not installed."""
        package = self.package(name)
        return {"name": name, "package": package.name, "version": package.version} if package else {}

    def load(self, name: str, places: Iterable[Path] = ()) -> Any:
        """What the entry point of this name names.

        Args:
            name: of the entry point.
            places: run and checkpoint folders, which may say what package it was of.

        Raises:
            UserError: there is none, with those that there are, the nearest, and the package that a checkpoint was made with;
                or several packages offer it, or it cannot be loaded.
        """
        points = self._points().get(name, [])
        if not points:
            raise self.unknown(name, places)
        if len(points) > 1:
            packages = ", ".join(str(_package(each)) for each in points)
            raise UserError(f"{self.key}: '{name}' is offered by several packages ({packages}); uninstall all but one")
        try:
            return points[0].load()
        except Exception as error:  # whatever the package does
            raise self.unfit(name, f"cannot be loaded ({type(error).__name__}: {error})", "mend or update") from None

    def load_class(self, name: str, base: type[T], places: Iterable[Path] = ()) -> type[T]:
        """As `load`, of a class that inherits from `base`. Raises UserError where it is none."""
        found = self.load(name, places)
        if not (isinstance(found, type) and issubclass(found, base)):
            value = self._points()[name][0].value
            raise self.unfit(name, f"is no {base.__name__} ({value} is {found!r:.80}, and no class that inherits from it)")
        return found

    def unknown(self, name: str, places: Iterable[Path] = ()) -> UserError:
        """The error for a name that no installed package offers."""
        names = self.names()
        there = f"is not one of {', '.join(names)}{nearest(name, names)}" if names else \
            f"is not installed, and no package that offers a {self.noun} is"
        return UserError(f"{self.key}: '{name}' {there}{self.advice(name, places)}")

    def unfit(self, name: str, why: str, mend: str = "update") -> UserError:
        """The error for one that does not do what it must; `why` says what about it."""
        return UserError(f"{self.key}: '{name}' of package {self.package(name)} {why}; {mend} the package, or choose another "
                         f"{self.noun}")

    def advice(self, name: str, places: Iterable[Path]) -> str:
        """What to install, to be added to a message, where a checkpoint in one of these run or checkpoint folders was made with
        one of this name."""
        for place in places:
            if package := self._recorded_package(place, name):
                return f"; {place} was made with that of package {package}: pip install {package}"
        return ""

    def other_version(self, name: str, checkpoint: Path) -> str | None:
        """What a checkpoint was made with and what is used here, where that is not the same version of a package."""
        was, now = self._recorded_package(checkpoint, name), self.package(name)
        return f"{was}, and {now or 'no package'} is used" if was and was != str(now) else None

    def _recorded_package(self, place: Path, name: str) -> str:
        was = recorded_origin(place, self.group, name)
        return f"{was['package']}=={was['version']}" if "package" in was else ""

    def _points(self) -> Mapping[str, list[EntryPoint]]:
        return _entry_points(self.group, tuple(sys.path))


@functools.lru_cache(maxsize=16)
def _entry_points(group: str, _path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Looks through all that is installed, which takes its time."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _package(point: EntryPoint) -> Package:
    if point.dist is None:
        return Package("unknown", "unknown")
    return Package(point.dist.name, point.dist.version, "".join(point.dist.metadata.get_all("Summary") or ()))


def recorded_origin(place: Path, group: str, name: str) -> dict[str, str]:
    """The `origin` of what a checkpoint, or the latest one of a run folder, was made with; empty where nobody says."""
    for folder in (place, *sorted(place.glob("checkpoints/step-*"), reverse=True)):
        try:
            about = json.loads((folder / "manifest.json").read_text())["about"]
            found = about["family"] if group == "genscale.families" else about["plugins"][group][name]
            # A stranger's checkpoint shall not put a command into a message.
            if found["name"] == name and all(PLAIN.fullmatch(value) for value in found.values()):
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}
