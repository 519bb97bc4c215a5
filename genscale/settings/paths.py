"""The settings of a config that are paths to read, and where such a path is looked for.

A relative path in a config file is looked for beside that file first, then in the current folder; one on the command line in
the current folder alone. What a run writes (`run.dir`, `data.cache`) goes by the current folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

PATHS = ("run.resume", "model.from", "data.source", "data.sources", "data.validation_source", "data.tokenizer",
         "objective.rewards")
"""All of them; of `data.sources` the `source` of each entry, of `objective.rewards` the `run`."""
WORDS = {"auto", "never", "bytes", "digits", "grid", "python-docs", "python-stdlib", "ring", "scratch", "sums"}
"""Values of theirs that are no paths."""


def beside(file: str, value: Any) -> Any:
    """A value of one of `PATHS` in that config file, with every relative path that leads to something beside the file taken
    from there. Others (names on a hub, addresses, what lies in the current folder) are left as they are."""
    if isinstance(value, str):
        if value in WORDS or not value or "://" in value or value.startswith("~"):
            return value
        found = os.path.join(os.path.dirname(file), value)  # of an absolute path, that
        return found if os.path.exists(found) else value
    if isinstance(value, list):
        return [beside(file, each) for each in value]
    if isinstance(value, dict):  # an entry of data.sources, or of objective.rewards
        return {**value, **{key: beside(file, value[key]) for key in ("source", "run") if key in value}}
    return value


def paths_beside(contents: Mapping[str, Mapping[str, Any]], flags: Sequence[str]) -> dict[str, Any]:
    """The paths that config files give, as `beside` has them: section.key -> value; only those that it changes.

    Args:
        contents: of the files, in the order in which one wins over those before it.
        flags: of the command line, which win over all files.
    """
    given = {flag.partition("=")[0].removeprefix("--") for flag in flags}
    found = {}
    for key in PATHS:
        section, _, name = key.partition(".")
        settings = [(file, own[name]) for file, content in contents.items()
                    if isinstance(own := content.get(section), Mapping) and name in own]
        if settings and key not in given and section not in given:
            file, value = settings[-1]
            if (path := beside(file, value)) != value:
                found[key] = path
    return found
