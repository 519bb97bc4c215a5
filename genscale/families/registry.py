"""Which families there are: built in, registered by the script that runs, and those of installed packages.

A package offers a family as an entry point of the group `genscale.families`, whose name is what `model.family` says and whose
value names a `Family`: `ring_flow = "ring_flow.family:family"`. A config can only choose among what is installed; nothing is
imported of a package whose family is not chosen.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from genscale.errors import UserError
from genscale.families.entry import Family

GROUP = "genscale.families"
PLAIN = re.compile(r"[\w./][\w.+!/-]*")
"""Names, versions and paths that can be typed as they are."""


@dataclass(frozen=True)
class Package:
    """The installed package that a family is of."""

    name: str
    version: str
    summary: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class Families(Mapping[str, Family]):
    """Families by name, those of the script first. Built-in ones win over a package's of the same name.

    Attributes:
        registered: those known in this process alone.
        script: the program that has registered a family, which another process must run to know it; None where there is none.
    """

    def __init__(self, built_in: Mapping[str, Family]) -> None:
        self._built_in, self.registered = dict(built_in), dict[str, Family]()
        self.script: str | None = None

    def __getitem__(self, name: str) -> Family:
        """Raises KeyError where there is none, and UserError where a package's own cannot be loaded."""
        for known in (self.registered, self._built_in):
            if name in known:
                return known[name]
        return _load(self._installed[name])

    def __iter__(self) -> Iterator[str]:
        yield from self.registered  # the first one is what a config without `model.family` means
        yield from (name for name in self._built_in if name not in self.registered)
        yield from (name for name in sorted(self._installed) if name not in self._built_in and name not in self.registered)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self.registered or name in self._installed

    @functools.cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=GROUP):  # looks through all that is installed: only where a name is not built in
            found.setdefault(point.name, []).append(point)
        return found

    def loadable(self) -> dict[str, Family]:
        """All families but those of packages that cannot be loaded, which is no matter where another is meant."""
        found = {}
        for name in self:
            with contextlib.suppress(UserError):
                found[name] = self[name]
        return found

    def register(self, family: Family) -> None:
        """Make a family known in this process, and in those that run the same script. Raises ValueError for a name that a
        built-in one has."""
        if family.name in self._built_in:
            raise ValueError(f"'{family.name}' is a built-in family; give yours another name")
        self.registered[family.name] = family
        self.script = getattr(sys.modules["__main__"], "__file__", None) or self.script

    def is_registered(self, name: str) -> bool:
        """Whether it is known in this process alone."""
        return name in self.registered

    def package(self, name: str) -> Package | None:
        """The installed package that the family is of; None for built-in and registered ones."""
        if name in self._built_in or name in self.registered or name not in self._installed:
            return None
        return _package(self._installed[name][0])

    def origin(self, name: str) -> dict[str, str]:
        """Where a family that is not built in comes from, as JSON; empty for the others."""
        if name in self.registered and self.script:
            return {"name": name, "script": self.script}
        package = self.package(name)
        return {"name": name, "package": package.name, "version": package.version} if package else {}

    def other_version(self, name: str, checkpoint: Path) -> str | None:
        """What a checkpoint was made with and what is used here, where that is not the same version of a package."""
        was, now = recorded_origin(checkpoint, name), self.package(name)
        if "package" not in was or (now is not None and str(now) == f"{was['package']}=={was['version']}"):
            return None
        return f"{was['package']}=={was['version']}, and {now or 'no package'} is used"

    def advice(self, name: str, places: Iterable[Path]) -> str:
        """Where a checkpoint in one of these run or checkpoint folders was made with a family that is not known here: what to
        install or to run, to be added to a message."""
        for place in places:
            was = recorded_origin(place, name)
            if "package" in was:
                package = f"{was['package']}=={was['version']}"
                return f"; {place} was made with that of package {package}: pip install {package}"
            if "script" in was:
                script = was["script"]
                return f"; {place} was made by {script}, which registers it: python {script} VERB ..."
        return ""


def recorded_origin(place: Path, family: str) -> dict[str, str]:
    """`origin` of the family that a checkpoint, or the latest one of a run folder, was made with; empty where nobody says."""
    for folder in (place, *sorted(place.glob("checkpoints/step-*"), reverse=True)):
        try:
            found = json.loads((folder / "manifest.json").read_text())["about"]["family"]
            # A stranger's checkpoint shall not put a command into a message.
            if found["name"] == family and all(PLAIN.fullmatch(value) for value in found.values()):
                return dict(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def _package(point: EntryPoint) -> Package:
    if point.dist is None:
        return Package("unknown", "unknown")
    return Package(point.dist.name, point.dist.version, "".join(point.dist.metadata.get_all("Summary") or ()))


def _load(points: list[EntryPoint]) -> Family:
    point, package = points[0], _package(points[0])
    if len(points) > 1:
        packages = ", ".join(str(_package(each)) for each in points)
        raise UserError(f"model.family: '{point.name}' is offered by several packages ({packages}); uninstall all but one")
    try:
        family = point.load()
    except Exception as error:  # whatever the package does
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"model.family: '{point.name}' of package {package} cannot be loaded ({reason}); mend "
                        "or update the package, or choose another family") from None
    if not isinstance(family, Family):
        raise UserError(f"model.family: '{point.name}' of package {package} is no Family ({point.value} is a "
                        f"{type(family).__name__}); update the package, or choose another family")
    if family.name != point.name:
        raise UserError(f"model.family: '{point.name}' of package {package} calls itself '{family.name}'; update the "
                        "package, or choose another family")
    return family
