"""genscale families: what `model.family` can be."""

from __future__ import annotations

from genscale import __version__
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.families.entry import NoSettings

USAGE = "usage: genscale families"
DESCRIPTION = ("List what model.family can be: name, package, version, and a line on what it is. A package offers families as "
               "entry points of the group genscale.families.")


def main(arguments: list[str]) -> int:
    """One line a family. Raises UserError for an argument, of which there are none."""
    if {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{DESCRIPTION}")
        return 0
    if arguments:
        raise UserError(f"'{arguments[0]}' is no setting of genscale families, which has none")
    rows = [_row(name) for name in FAMILIES]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0


def _row(name: str) -> tuple[str, str, str, str]:
    """Name, package, version, and what it is, or why it cannot be loaded."""
    package = FAMILIES.package(name)
    of = (package.name, package.version) if package else ("this script", "") if FAMILIES.is_registered(name) else \
        ("genscale", __version__)
    try:
        settings = FAMILIES[name].model_settings
    except UserError as error:
        return name, *of, str(error).removeprefix("model.family: ")
    summary = package.summary if package and package.summary else ""
    line = summary or ("" if issubclass(settings, NoSettings) else (settings.__doc__ or "").strip().split("\n")[0])
    return name, *of, line
