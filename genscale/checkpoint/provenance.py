"""What made a checkpoint, and how far through the data it is: for people who find it later."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import genscale
from genscale.checkpoint.code_version import commit
from genscale.data.row_source import sources_in
from genscale.data.spec import SOURCES
from genscale.families import FAMILIES
from genscale.families.registry import INSTALLED
from genscale.hook import HOOKS
from genscale.plugins import Plugins
from genscale.settings.config import Config


def provenance(world_size: int, strategy: str, position: str, config: Config) -> dict[str, Any]:
    """As JSON: versions, commit of the code, host, time, the shape of the run, its position in the data, the package or script
    of its family where that is not built in, and the packages of what else it has chosen among the installed."""
    origin, others = FAMILIES.origin(config.model.family), dict[str, dict[str, Any]]()
    for plugins, name in chosen_plugins(config):
        if plugins is not INSTALLED:
            others.setdefault(plugins.group, {})[name] = plugins.origin(name)
    chosen = {name: value for name, value in (("family", origin), ("plugins", others)) if value}
    return {**chosen, "versions": versions(), "commit": commit(), "host": platform.node(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "world_size": world_size, "strategy": strategy,
            "position": position}


def chosen_plugins(config: Config) -> list[tuple[Plugins, str]]:
    """What the config chooses among the installed: the group, and the name in it; the family always, wherever it is of."""
    sources = [name for name in sources_in(config.data) if name in SOURCES]
    return [(INSTALLED, config.model.family), *((SOURCES, name) for name in sources), *((HOOKS, name) for name in config.hooks)]


def check_sources(config: Config, places: Sequence[Path]) -> None:
    """Raises UserError where the data source of a package is not installed here that a checkpoint in one of these run or
    checkpoint folders was made with: what has its name elsewhere would be other data."""
    for name in sources_in(config.data):
        if name not in SOURCES and SOURCES.advice(name, places):
            raise SOURCES.unknown(name, places)


def versions() -> dict[str, str]:
    """The versions of Python, of genscale and of what it computes with here."""
    found = {"python": platform.python_version(), "genscale": genscale.__version__, "torch": torch.__version__}
    for name in ("deepspeed", "accelerate"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def position_in_words(samples: int, samples_of_epoch: int | None) -> str:
    """"epoch 2, 13.4 M of 20 M samples", or without epochs "13.4 M samples"."""
    if not samples_of_epoch:
        return f"{_rounded(samples)} samples"
    epoch, inside = divmod(samples, samples_of_epoch)
    if samples and not inside:  # at the end of an epoch, not at the start of the next
        epoch, inside = epoch - 1, samples_of_epoch
    return f"epoch {epoch + 1}, {_rounded(inside)} of {_rounded(samples_of_epoch)} samples"


def _rounded(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}" if number < 1000 * size else f"{number / size:,.0f} {letter}"
    return str(number)
