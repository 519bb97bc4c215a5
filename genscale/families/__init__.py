"""The families: what `model.family` can be. A new family is one folder here and one name below, or an installed package's, or
one that the running script registers (`genscale.families.registry`)."""

from __future__ import annotations

from genscale.errors import UserError, nearest
from genscale.families import dcgan, gpt, points, reward, vae, vae_gan
from genscale.families.entry import Family
from genscale.families.registry import Families

FAMILIES = Families({entry.FAMILY.name: entry.FAMILY for entry in (gpt, dcgan, points, vae, vae_gan, reward)})
"""All by name; the first built-in one is that of a run without `model.family`."""


def family(name: str) -> Family:
    """The entry of the family that `model.family` calls by this name.

    Raises:
        UserError: there is none; with those that there are, and the nearest. Or a package's own cannot be loaded.

    Example:
        >>> family("vae").data_settings.__name__
        'ImageDataSettings'
    """
    if name not in FAMILIES:
        names = list(FAMILIES)
        raise UserError(f"model.family: '{name}' is not one of {', '.join(names)}{nearest(name, names)}")
    return FAMILIES[name]


def register(family: Family) -> None:
    """Make a family of one's own known to this process: to a config whose `model.family` is its name, to every verb, and to the
    processes that run the same script (`accelerate launch my_script.py`, torchrun, `python my_script.py train --processes 2`).
    A job of `genscale slurm submit` runs genscale itself, and knows only what is installed (`genscale.families.registry`).

    Raises:
        ValueError: the name is that of a built-in family.
    """
    FAMILIES.register(family)
