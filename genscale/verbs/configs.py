"""genscale configs: what can be run by name."""

from __future__ import annotations

from genscale import exit_codes
from genscale.errors import UserError
from genscale.settings.shipped import CONFIGS, LAUNCH, description, shipped_names

USAGE = """usage: genscale configs

List the configs that genscale brings: each runs by its name, as in `genscale train --config gpt/demo`."""


def main(arguments: list[str]) -> int:
    """Print a line for each. Raises UserError."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return exit_codes.DONE
    if arguments:
        raise UserError(f"genscale configs: takes no '{arguments[0]}'; leave it out")
    names = shipped_names()
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:<{width}}  {description(name)}")
    print(f"\ntheir files: {CONFIGS}\nfiles for `accelerate launch --config_file`, one a strategy: {LAUNCH}")
    return exit_codes.DONE
