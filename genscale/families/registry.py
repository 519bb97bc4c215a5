"""Which families there are: built in, registered by the script that runs, and those of installed packages.

A package offers a family as an entry point of the group `genscale.families`, whose name is what `model.family` says and whose
value names a `Family`: `ring_flow = "ring_flow.family:family"`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from genscale.errors import UserError
from genscale.families.entry import Family
from genscale.plugins import Package, Plugins, recorded_origin

INSTALLED = Plugins("genscale.families", "model.family", "family")


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
        if name not in INSTALLED:
            raise KeyError(name)
        return _load(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.registered  # the first one is what a config without `model.family` means
        yield from (name for name in self._built_in if name not in self.registered)
        yield from (name for name in INSTALLED.names() if name not in self._built_in and name not in self.registered)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self.registered or name in INSTALLED  # which looks through all packages

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
        return None if name in self._built_in or name in self.registered else INSTALLED.package(name)

    def origin(self, name: str) -> dict[str, str]:
        """Where a family that is not built in comes from, as JSON; empty for the others."""
        if name in self.registered and self.script:
            return {"name": name, "script": self.script}
        return INSTALLED.origin(name) if self.package(name) else {}

    def advice(self, name: str, places: Iterable[Path]) -> str:
        """Where a checkpoint in one of these run or checkpoint folders was made with a family that is not known here: what to
        install or to run, to be added to a message."""
        for place in places:
            was = recorded_origin(place, INSTALLED.group, name)
            if "script" in was:
                script = was["script"]
                return f"; {place} was made by {script}, which registers it: python {script} VERB ..."
            if was:
                return INSTALLED.advice(name, [place])
        return ""


def _load(name: str) -> Family:
    family = INSTALLED.load(name)
    if not isinstance(family, Family):
        raise INSTALLED.unfit(name, f"is no Family (it is a {type(family).__name__})")
    if family.name != name:
        raise INSTALLED.unfit(name, f"calls itself '{family.name}'")
    return family
