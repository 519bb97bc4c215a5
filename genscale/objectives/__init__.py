"""The families: what `model.family` can be. A new family is one line here."""

from __future__ import annotations

from genscale.objectives.base import Family
from genscale.objectives.language_model import FAMILY as GPT

FAMILIES: dict[str, Family] = {"gpt": GPT}
