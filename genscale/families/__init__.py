"""The families: what `model.family` can be. A new family is one folder here and one name below, or an installed package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from genscale.errors import UserError, nearest
from genscale.families import dcgan, gpt, points, vae, vae_gan
from genscale.families.family import Family

BUILT_IN: dict[str, Family] = {entry.FAMILY.name: entry.FAMILY for entry in (gpt, dcgan, points, vae, vae_gan)}


def family(name: str) -> Family:
    """The entry of the family that `model.family` calls by this name.

    Raises:
        UserError: there is none; with those that there are, and the nearest.

    Example:
        >>> family("vae").data_settings.__name__
        'ImageDataSettings'
    """
    if name not in BUILT_IN:
        raise UserError(f"model.family: '{name}' is not one of {', '.join(names())}{nearest(name, names())}")
    return BUILT_IN[name]


def names() -> list[str]:
    """Names of all families, the one that a run without `model.family` has first."""
    return list(BUILT_IN)


class _Families(Mapping[str, Family]):
    """All families by name, as the parser of a config asks for them."""

    def __getitem__(self, name: str) -> Family:
        try:
            return family(name)
        except UserError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(names())

    def __len__(self) -> int:
        return len(names())


FAMILIES: Mapping[str, Family] = _Families()
