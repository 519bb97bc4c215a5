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
from typing import Any, TypeAlias

from genscale.errors import UserError, nearest
from genscale.plugins import Plugins
from genscale.rewards.base import ImageReward, Reward, TextReward

INSTALLED = Plugins("genscale.rewards", "name", "reward")
BUILT_IN = {
    "exact": "texts:Exact", "one_of": "texts:OneOf", "numeric": "texts:Numeric", "arithmetic": "arithmetic:Arithmetic",
    "length": "texts:Length", "repetition": "texts:Repetition", "regex": "patterns:Pattern", "grammar": "grammar:Grammar",
    "json": "structure:Json", "balanced": "structure:Balanced", "likelihood": "runs:Likelihood",
    "program": "program:ProgramReward", "http": "web:WebReward", "brightness": "pictures:Brightness",
    "classifier": "pictures:Classified",
}  # fmt: skip
"""By name, the module of this room and the class in it."""
Given: TypeAlias = type[Reward] | Callable[..., Any]
"""A reward of the running script: a function of what is judged, or a class."""


class RewardRegistry(Mapping[str, type[Reward]]):
    """Reward classes by name.

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
        if name not in INSTALLED:
            raise KeyError(name)
        return INSTALLED.load_class(name, Reward)

    def __iter__(self) -> Iterator[str]:
        yield from self.given
        yield from BUILT_IN  # whose names no other may have
        yield from (name for name in INSTALLED.names() if name not in BUILT_IN and name not in self.given)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.given or name in BUILT_IN or name in INSTALLED  # which looks through all packages

    def make(self, name: str, asked: Any, reads: type[Reward]) -> Reward:
        """The reward of a name, with its settings; a function that a script gives judges what the policy makes, `reads`."""
        value = self.given.get(name)
        if value is not None and not isinstance(value, type):
            return GivenTextReward(value, asked) if reads is TextReward else GivenImageReward(value, asked)
        return self[name](asked)

    def origin(self, name: str) -> dict[str, str]:
        """Where a reward that is not built in comes from, as JSON; empty for the others."""
        if name in BUILT_IN:
            return {}
        if name in self.given:
            return {"name": name, "script": getattr(sys.modules["__main__"], "__file__", None) or "a session"}
        return INSTALLED.origin(name)

    @contextmanager
    def knowing(self, given: Mapping[str, Given]) -> Iterator[None]:
        """Inside, these are known too. Raises UserError for a name that a built-in one has, and for what is neither a function
        nor a class of rewards."""
        for name, value in given.items():
            if name in BUILT_IN:
                raise UserError(f"rewards: '{name}' is a built-in reward; give yours another name")
            if not callable(value) or (isinstance(value, type) and not issubclass(value, (TextReward, ImageReward))):
                raise UserError(f"rewards: '{name}' is {value!r:.80}; it must be a function of a list of answers (or of images)"
                                ", or a class that inherits from TextReward or ImageReward")
        before, self.given = self.given, {**self.given, **given}
        try:
            yield
        finally:
            self.given = before


class GivenReward(Reward):
    """A function that the running script gives. Nobody knows whether it says the same when it is asked again."""

    repeatable = False


class GivenTextReward(GivenReward, TextReward):
    """The same where the policy writes text."""

    def __init__(self, function: Callable[..., Any], asked: Any) -> None:
        super().__init__(asked)
        self._function = function

    def judge(self, answers: Any) -> Any:
        """What the function says."""
        return self._function(answers)


class GivenImageReward(GivenReward, ImageReward):
    """The same where it makes pictures."""

    def __init__(self, function: Callable[..., Any], asked: Any) -> None:
        super().__init__(asked)
        self._function = function

    def judge(self, images: Any) -> Any:
        """What the function says."""
        return self._function(images)


REWARDS = RewardRegistry()
"""All by name."""


def unknown(name: str, names: list[str]) -> str:
    """What is wrong with a name that no reward has."""
    return (f"name: '{name}' is not one of {', '.join(names)}{nearest(name, names)}; a config names no code: give your own as "
            f"genscale.train(config, rewards={{...}}), or as an installed package with an entry point {INSTALLED.group}")
