"""The family `vq_vae`: images as maps of codes (van den Oord et al. 2017)."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from jsonargparse.typing import OpenUnitInterval, PositiveFloat, PositiveInt

from genscale.data.images.settings import ImageDataSettings
from genscale.families.entry import Family


@dataclass(frozen=True)
class VQVAESettings:
    """What the network is."""

    family: Literal["vq_vae"] = "vq_vae"
    """What is trained."""
    width: PositiveInt = 64
    """Channels of the hidden layers."""
    codes: PositiveInt = 64
    """Rows of the codebook."""
    code_width: PositiveInt = 16
    """Numbers in a row."""
    decay: OpenUnitInterval = 0.95
    """Share of its moving averages that the codebook keeps in an update."""


@dataclass(frozen=True)
class VQVAEObjectiveSettings:
    """What is minimised."""

    commitment: PositiveFloat = 0.25
    """Weight of the distance of the encoder's vectors from their codes."""


def _module() -> ModuleType:
    from vq_vae import objective  # torch takes a second to load

    return objective


FAMILY = Family(
    VQVAESettings, ImageDataSettings, _module, VQVAEObjectiveSettings,
    tiny={"model.width": 8, "model.codes": 8, "model.code_width": 4, "data.source": "digits", "data.size": 8,
          "data.channels": 1, "data.validation_images": 40},
)  # fmt: skip
