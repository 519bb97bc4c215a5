"""genscale data build|inspect: fill the token cache ahead of a run, and see what a run would train on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jsonargparse.typing import PositiveInt

from genscale.data.images.settings import ImageDataSettings
from genscale.data.text.prompt_settings import PromptDataSettings
from genscale.data.text.settings import TextDataSettings
from genscale.errors import UserError, nearest
from genscale.families import FAMILIES
from genscale.settings.parser import parse_config, parse_settings, take_number

ACTIONS = {"build": "Fill the token cache (data.cache) ahead of a run; stopped and started again, it goes on where it was.",
           "inspect": "Show what would be trained on (with --config FILE: by that run): a few blocks of text and what is "
                      "known of their documents, or the number, classes and damage of images."}


@dataclass
class BuildSettings:
    """What to tokenise."""

    data: TextDataSettings = field(default_factory=TextDataSettings)
    processes: PositiveInt | None = None
    """Processes that tokenise beside each other (default: one for each core)."""


@dataclass
class InspectSettings:
    """What to look at."""

    data: TextDataSettings = field(default_factory=TextDataSettings)
    seed: int = 1337
    """The run's seed, on which the order of the documents depends."""
    blocks: PositiveInt = 3
    """Blocks to show."""


def main(arguments: list[str]) -> int:
    action = arguments[0] if arguments else ""
    if action in ("-h", "--help"):
        print("\n".join(["usage: genscale data build|inspect [settings]", "",
                         *(f"  {name:<9}{meaning}" for name, meaning in ACTIONS.items())]))
        return 0
    if action not in ACTIONS:
        raise UserError(f"genscale data: '{action}' is not one of: {', '.join(ACTIONS)}{nearest(action, ACTIONS)}")
    if action == "inspect" and any(word.startswith(("--config", "--model.family")) for word in arguments[1:]):
        return _inspect_run(arguments[1:])
    kind = BuildSettings if action == "build" else InspectSettings
    settings = parse_settings(kind, arguments[1:], f"genscale data {action}", ACTIONS[action])
    if action == "build":
        from genscale.verbs.data_build import fill_cache

        return fill_cache(settings.data, settings.processes or len(os.sched_getaffinity(0)))
    from genscale.verbs.data_inspect import inspect

    with _notes_on_stderr():
        return inspect(settings.data, settings.seed, settings.blocks)


def _inspect_run(arguments: list[str]) -> int:
    """What the run of a config would train on."""
    blocks, rest = take_number(arguments, "--blocks", least=1)
    config = parse_config(FAMILIES, rest, "genscale data inspect", ACTIONS["inspect"])
    from genscale.verbs.data_inspect import inspect
    from genscale.verbs.image_inspect import inspect_images
    from genscale.verbs.prompt_inspect import inspect_prompts

    with _notes_on_stderr():
        if isinstance(config.data, TextDataSettings):
            return inspect(config.data, config.run.seed, blocks or InspectSettings.blocks)
        if isinstance(config.data, PromptDataSettings):
            return inspect_prompts(config.data, config.run.seed, blocks or InspectSettings.blocks)
        if isinstance(config.data, ImageDataSettings):
            return inspect_images(config.data, config.run.seed)
    raise UserError(f"model.family={config.model.family}: only text, prompts and images can be inspected, and its data is none "
                    "of these")


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """What a run would log about its data, such as what it leaves out."""
    logger, handler = logging.getLogger("genscale.data"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
