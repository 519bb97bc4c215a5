"""genscale rewards: what `objective.rewards` can name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args, get_type_hints

from genscale import exit_codes
from genscale.errors import UserError
from genscale.rewards.base import ImageReward, Reward, TextReward
from genscale.rewards.registry import INSTALLED, REWARDS
from genscale.settings.keys import as_key
from genscale.settings.parser import RunParser

USAGE = "usage: genscale rewards"
DESCRIPTION = ("List what objective.rewards can name: what it judges, a line on what it is worth, and its settings beside name "
               "and weight. A package offers rewards as entry points of the group genscale.rewards; a script gives its own as "
               "genscale.train(config, rewards={...}).")


def main(arguments: list[str]) -> int:
    """A paragraph a reward. Raises UserError for an argument, of which there are none."""
    if {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{DESCRIPTION}")
        return exit_codes.DONE
    if arguments:
        raise UserError(f"'{arguments[0]}' is no setting of genscale rewards, which has none")
    width = max(map(len, REWARDS))
    for name in REWARDS:
        for line in described(name, width):
            print(line)
    return exit_codes.DONE


def described(name: str, width: int = 0) -> list[str]:
    """Lines about a reward: its name, what it judges and what it is worth; then each setting."""
    try:
        kind = REWARDS[name]
    except UserError as error:  # of a package
        return [f"{name:<{width}}  {str(error).removeprefix('name: ')}"]
    package = INSTALLED.package(name)
    of = f" ({package})" if package else ""
    settings = [f"{'':<{width}}    {key} ({of_kind}, {default}): {meaning}" for key, of_kind, default, meaning in rows_of(kind)]
    return [f"{name:<{width}}  {judges(kind):<6}  {sentence(kind)}{of}", *settings]


def sentence(kind: type[Reward]) -> str:
    """What it is worth."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def judges(kind: type[Reward]) -> str:
    """What it is a reward of, in a word."""
    return "text" if issubclass(kind, TextReward) else "images" if issubclass(kind, ImageReward) else "either"


def rows_of(kind: type[Reward]) -> list[tuple[str, str, str, str]]:
    """Of each of its settings: name, type, default, meaning."""
    parser, rows = RunParser(), []
    if dataclasses.is_dataclass(kind.settings) and dataclasses.fields(kind.settings):
        parser.add_class_arguments(kind.settings)
    kinds = get_type_hints(kind.settings)
    for action in parser._actions:
        if action.dest in kinds:
            named = kinds[action.dest]
            of = str(named).replace("typing.", "").replace("jsonargparse.", "") if get_args(named) else named.__name__
            default = "required" if action.required else f"default {action.default!r}"
            rows.append((as_key(action.dest), of, default, " ".join((action.help or "").split())))
    return rows
