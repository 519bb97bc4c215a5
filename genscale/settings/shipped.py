"""The configs that come with genscale, called by name: `--config gpt/demo`, from a checkout or from an installed wheel.

In a checkout `genscale/configs` is a link to `configs/`; a wheel holds the files themselves in its place.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import genscale

CONFIGS = Path(genscale.__file__).resolve().parent / "configs"
LAUNCH = CONFIGS.with_name("launch")
"""Files for `accelerate launch --config_file`, one a strategy."""
MOST = 110
"""Characters of a description."""


def shipped_names() -> list[str]:
    """The configs by name, as `gpt/demo`; none in a job's copy of the code, which runs the config kept beside it."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml"))


def find_config(word: str) -> str:
    """The file that `--config` means: a file of that path, else the shipped config of that name, else the word as it is."""
    if os.path.exists(word) or word not in shipped_names():
        return word
    return str(CONFIGS / f"{word}.yaml")


def description(name: str) -> str:
    """The first sentence of a shipped config's own first comment, in one line."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("# ") or line.startswith("#  "):  # commands are set in
            break
        comment.append(line.removeprefix("# "))
    sentence = re.split(r"(?<! al)\. |[.:] (?=[A-Z`])|; (?![^(]*\))", " ".join(comment))[0].rstrip(".:")
    return textwrap.shorten(sentence, MOST, placeholder=" ...")
