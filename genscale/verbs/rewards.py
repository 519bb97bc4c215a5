"""genscale rewards: what `objective.rewards` can name."""

from __future__ import annotations

import inspect
from typing import get_type_hints

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
    sentence = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    return [f"{name:<{width}}  {judges(kind):<6}  {sentence}{of}", *(f"{'':<{width}}    {line}" for line in settings_of(kind))]


def judges(kind: type[Reward]) -> str:
    """What it is a reward of, in a word."""
    return "text" if issubclass(kind, TextReward) else "images" if issubclass(kind, ImageReward) else "either"


def settings_of(kind: type[Reward]) -> list[str]:
    """A line for each of its settings: name, type, default, meaning."""
    parser, lines = RunParser(), []
    parser.add_class_arguments(kind.settings)
    kinds = get_type_hints(kind.settings)
    for action in parser._actions:
        if action.dest in kinds:
            of = getattr(kinds[action.dest], "__name__", "") if not hasattr(kinds[action.dest], "__args__") else \
                str(kinds[action.dest]).replace("typing.", "")
            default = "required" if action.required else f"default {action.default!r}"
            lines.append(f"{as_key(action.dest)} ({of}, {default}): {' '.join((action.help or '').split())}")
    return lines
