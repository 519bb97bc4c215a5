"""The families: what `model.family` can be. A new family is one folder here and one name below, or an installed package."""

from __future__ import annotations

from genscale.errors import UserError, nearest
from genscale.families import dcgan, gpt, points, vae, vae_gan
from genscale.families.family import Family

FAMILIES: dict[str, Family] = {entry.FAMILY.name: entry.FAMILY for entry in (gpt, dcgan, points, vae, vae_gan)}
"""All by name; the first is that of a run without `model.family`."""


def family(name: str) -> Family:
    """The entry of the family that `model.family` calls by this name.

    Raises:
        UserError: there is none; with those that there are, and the nearest.

    Example:
        >>> family("vae").data_settings.__name__
        'ImageDataSettings'
    """
    if name not in FAMILIES:
        raise UserError(f"model.family: '{name}' is not one of {', '.join(FAMILIES)}{nearest(name, FAMILIES)}")
    return FAMILIES[name]
