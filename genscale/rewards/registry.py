"""Which rewards there are: built in, given by the script that runs, and those of installed packages.

A package offers a reward as an entry point of the group `genscale.rewards`, whose name is what a config says and whose value
names a class that inherits from `TextReward` or `ImageReward`: `politeness = "our_rewards:Politeness"`. A config can only
choose among what is known; it never names a module, a file or a program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias

from genscale.errors import UserError, nearest
from genscale.rewards.base import ImageReward, Reward, TextReward

GROUP = "genscale.rewards"
BUILT_IN = {
    "exact": "texts:Exact", "one_of": "texts:OneOf", "numeric": "texts:Numeric", "length": "texts:Length",
    "repetition": "texts:Repetition", "regex": "patterns:Pattern",
}  # fmt: skip
"""By name, the module of this room and the class in it."""
Given: TypeAlias = type[Reward] | Callable[..., Any]
"""A reward of the running script: a function of what is judged, or a class."""


class RewardRegistry(Mapping[str, type[Reward]]):
    """Reward classes by name: built-in ones, those that the running script gives, those of installed packages.

    Attributes:
        given: what `genscale.train(config, rewards={"mine": f})` has brought, while it runs.
    """

    def __init__(self) -> None:
        self.given: dict[str, Given] = {}

    def __getitem__(self, name: str) -> type[Reward]:
        """Raises KeyError where there is none, and UserError where a package's own cannot be loaded."""
        if name in self.given:
            value = self.given[name]
            return value if isinstance(value, type) else GivenReward
        if name in BUILT_IN:
            module, _, kind = BUILT_IN[name].partition(":")
            found: type[Reward] = getattr(import_module(f"genscale.rewards.{module}"), kind)
            return found
        points = self._installed().get(name)
        if points is None:
            raise KeyError(name)
        return _loaded(points)

    def __iter__(self) -> Iterator[str]:
        yield from self.given
        yield from (name for name in BUILT_IN if name not in self.given)
        yield from (name for name in sorted(self._installed()) if name not in BUILT_IN and name not in self.given)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.given or name in BUILT_IN or name in self._installed()

    def make(self, name: str, asked: Any, reads: type[Reward]) -> Reward:
        """The reward of a name, with its settings; a function that a script gives judges what the policy makes, `reads`."""
        value = self.given.get(name)
        if value is not None and not isinstance(value, type):
            return (GivenTextReward if reads is TextReward else GivenImageReward)(value, asked)
        return self[name](asked)

    def origin(self, name: str) -> dict[str, str]:
        """Where a reward that is not built in comes from, as JSON; empty for the others."""
        if name in self.given:
            return {"name": name, "script": getattr(sys.modules["__main__"], "__file__", None) or "a session"}
        if name in BUILT_IN or name not in self._installed():
            return {}
        distribution = self._installed()[name][0].dist
        return {"name": name, "package": distribution.name if distribution else "unknown",
                "version": distribution.version if distribution else "unknown"}

    @contextmanager
    def knowing(self, given: Mapping[str, Given]) -> Iterator[None]:
        """Inside, these are known too. Raises UserError for a name that a built-in one has, and for what is neither a function
        nor a class of rewards."""
        for name, value in given.items():
            if name in BUILT_IN:
                raise UserError(f"rewards: '{name}' is a built-in reward; give yours another name")
            is_class = isinstance(value, type)
            if (is_class and not issubclass(value, Reward)) or not callable(value):
                raise UserError(f"rewards: '{name}' is {value!r:.80}; it must be a function of a list of answers (or of images)"
                                ", or a class that inherits from TextReward or ImageReward")
        before, self.given = self.given, {**self.given, **given}
        try:
            yield
        finally:
            self.given = before

    def _installed(self) -> Mapping[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=GROUP):
            found.setdefault(point.name, []).append(point)
        return found


def _loaded(points: list[EntryPoint]) -> type[Reward]:
    point = points[0]
    if len(points) > 1:
        raise UserError(f"'{point.name}' is offered by several packages; uninstall all but one")
    package = f"{point.dist.name}=={point.dist.version}" if point.dist else "unknown"
    try:
        found = point.load()
    except Exception as error:  # whatever the package does
        raise UserError(f"'{point.name}' of package {package} cannot be loaded ({type(error).__name__}: {error}); mend or "
                        "update the package, or choose another reward") from None
    if not (isinstance(found, type) and issubclass(found, (TextReward, ImageReward))):
        raise UserError(f"'{point.name}' of package {package} is no TextReward and no ImageReward ({point.value} is "
                        f"{found!r:.80}); update the package, or choose another reward")
    return found


class GivenReward(Reward):
    """A function that the running script gives; what it judges is known where the policy is."""

    repeatable = False


class GivenTextReward(TextReward):
    """A function of answers that the running script gives. Nobody knows whether it answers the same when asked again."""

    repeatable = False

    def __init__(self, function: Callable[..., Any], asked: Any) -> None:
        super().__init__(asked)
        self.judge = function  # type: ignore[method-assign]

    def judge(self, answers: Any) -> Any:
        """What the function says."""


class GivenImageReward(ImageReward):
    """The same of pictures."""

    repeatable = False

    def __init__(self, function: Callable[..., Any], asked: Any) -> None:
        super().__init__(asked)
        self.judge = function  # type: ignore[method-assign]

    def judge(self, images: Any) -> Any:
        """What the function says."""


REWARDS = RewardRegistry()
"""All by name."""


def unknown(name: Any, names: list[str]) -> UserError:
    """The error for a name that no reward has."""
    return UserError(f"'{name}' is not one of {', '.join(names)}{nearest(str(name), names)}; a config names no code: give your "
                     "own as genscale.train(config, rewards={...}), or as an installed package with an entry point "
                     f"{GROUP}")

