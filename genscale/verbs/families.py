"""genscale families: what `model.family` can be, and what else a config can choose of installed packages."""

from __future__ import annotations

import dataclasses

from genscale import __version__
from genscale.data.row_source import RowSource
from genscale.data.spec import SOURCES
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.families.entry import NoSettings
from genscale.hook import HOOKS, Hook
from genscale.plugins import Plugins

USAGE = "usage: genscale families"
DESCRIPTION = ("List what model.family can be: name, package, version, and a line on what it is; below, by the setting that "
               "chooses them, the data sources and hooks of installed packages. A package offers them as entry points of the "
               "groups genscale.families, genscale.data and genscale.hooks.")
OTHERS: dict[Plugins, type] = {SOURCES: RowSource, HOOKS: Hook}
"""The groups beside that of the families, and what theirs inherit from."""


def main(arguments: list[str]) -> int:
    """One line a family, and one each of the others. Raises UserError for an argument, of which there are none."""
    if {"-h", "--help"} & set(arguments):
        print(f"{USAGE}\n\n{DESCRIPTION}")
        return 0
    if arguments:
        raise UserError(f"'{arguments[0]}' is no setting of genscale families, which has none")
    tables = {"": [_row(name) for name in FAMILIES]}
    tables |= {plugins.key: [_row_of(plugins, base, name) for name in plugins.names()] for plugins, base in OTHERS.items()}
    rows = [row for table in tables.values() for row in table]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for key, table in tables.items():
        if key and table:
            print(f"\n{key}:")
        for row in table:
            print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0


def _row_of(plugins: Plugins, base: type, name: str) -> tuple[str, str, str, str]:
    """Name, package, version, and what it is with its settings, or why it cannot be loaded."""
    package = plugins.package(name)
    assert package is not None
    try:
        kind: type = plugins.load_class(name, base)
    except UserError as error:
        return name, package.name, package.version, str(error).removeprefix(f"{plugins.key}: ")
    settings = ", ".join(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ""
    line = (kind.__dict__.get("__doc__") or "").strip().split("\n")[0]
    return name, package.name, package.version, f"{line} Settings: {settings}." if settings else line


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
