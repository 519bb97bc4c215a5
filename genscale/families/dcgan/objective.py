"""The family `dcgan`: GANs on images."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genscale.data.images.data import ImageData
from genscale.data.images.grouped import ImagesInLanes, gan_images
from genscale.data.images.settings import PackedImageDataSettings
from genscale.data.lanes import Sample
from genscale.errors import UserError
from genscale.families.dcgan.networks import DCGANDiscriminator, DCGANGenerator, StagedDiscriminator
from genscale.families.dcgan.residual import ResidualDiscriminator, ResidualGenerator
from genscale.families.dcgan.settings import GANSettings, check_gan
from genscale.models.feature_network import RandomFeatures
from genscale.models.image_grid import grid
from genscale.models.image_layers import to_signed, to_unit
from genscale.models.lettering import class_captions
from genscale.models.mlp_gan import MLPDiscriminator, MLPGenerator
from genscale.objectives.base import Batch, Blueprint, Networks
from genscale.objectives.gan import GAN, INITIAL_STD
from genscale.objectives.gan_settings import GANObjectiveSettings, check_batch, check_losses
from genscale.objectives.sample_quality import distance, distance_units, diversity
from genscale.reading import Unreadable, read_json
from genscale.settings.config import Config
from genscale.writing import write_whole

log = logging.getLogger("genscale")

NETWORKS = {"dcgan": (DCGANGenerator, DCGANDiscriminator), "residual": (ResidualGenerator, ResidualDiscriminator),
            "mlp": (MLPGenerator, MLPDiscriminator)}
CLASSES_FILE = "classes.json"
PREVIEW_IMAGES = 64


class ImageGAN(GAN):
    """A GAN on images.

    A batch holds `image`, uint8 `(batch, channels, size, size)` or `(batch, pack, channels, size, size)`, and where conditional
    `label`. Validation is by the Frechet distance of as many samples as there are validation images, in the features of a
    random network (`loss` and `fd`; of few images another distance), and by the diversity of the samples there.

    Args:
        image_shape: `(channels, size, size)`.
        class_names: of a conditional GAN.
    """

    unit = "images"
    loss_unit = "Frechet distance, random features"
    higher_is_better = frozenset({"diversity"})

    def __init__(self, generator: nn.Module, discriminator: nn.Module, settings: GANObjectiveSettings, *,
                 image_shape: tuple[int, int, int], class_names: list[str] | None = None, **options: Any) -> None:
        super().__init__(generator, discriminator, settings, conditional=class_names is not None, **options)
        self.image_shape, self.class_names = image_shape, class_names
        self._features = RandomFeatures()
        # As convolutions take them, in the same walk; but where pixels are added up, in an order that is that of the layout.
        adds_up = settings.augmentation or settings.gradient_penalty or settings.r1
        plain = isinstance(discriminator, StagedDiscriminator) and self.pack == 1 and not adds_up
        self._layout = torch.channels_last if plain else torch.preserve_format

    def reals(self, batch: Batch) -> Tensor:
        """In [-1, 1]."""
        return to_signed(batch["image"], self._layout)

    def generate(self, networks: Networks, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images fp32 `(batch, channels, size, size)` in [0, 1] from latents `(batch, latent)` and, where conditional,
        classes."""
        return (networks["generator"](latents, labels).float() + 1) / 2

    def evaluate(self, networks: Networks, batch: Batch) -> dict[str, Tensor]:
        """Features `(batch, width)` of the batch's images and of as many samples, of the same classes."""
        latents = self.latents("evaluation", batch["sample"], batch["image"].device)
        features = self._features.to(latents.device)
        fakes = self.generate(networks, latents, self.labels(batch))
        return {"real_features": features(to_unit(batch["image"])), "fake_features": features(fakes)}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """`loss` and `fd` (or `mmd`): see `distance`; `diversity`: 0 where all samples are alike, about 1 for images as varied
        as real ones, left out where these do not vary."""
        real, fake = totals["real_features"], totals["fake_features"]
        found = distance(real, fake)
        variety = diversity(real, fake) if math.isfinite(found["loss"]) else 0.0
        return found if variety is None else {**found, "diversity": variety}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """A grid of samples, the same latents each time; a column for each class where conditional."""
        numbers = torch.arange(PREVIEW_IMAGES)
        labels, columns = None, None
        if self.class_names is not None:
            labels, columns = numbers.to(device) % len(self.class_names), min(len(self.class_names), 10)
        names = None if labels is None else [self._captions[label] for label in labels.tolist()]
        return grid(self.generate(networks, self.latents("preview", numbers, device), labels), columns, names)

    @cached_property
    def _captions(self) -> list[str]:
        captions, problem = class_captions(self.class_names or [])
        if problem:
            log.warning("%s", problem)
        return captions

    def save_assets(self, folder: Path) -> None:
        """The names of the classes."""
        if self.class_names is not None:
            write_whole(folder / CLASSES_FILE, json.dumps(self.class_names, ensure_ascii=False))


GANConfig = Config[GANSettings, PackedImageDataSettings, GANObjectiveSettings]


def build_data(settings: PackedImageDataSettings, seed: int) -> ImagesInLanes:
    return gan_images(ImageData(settings, seed), settings)


def validation(settings: PackedImageDataSettings, seed: int) -> list[Sample]:
    return gan_images(ImageData(settings, seed, for_training=False), settings).validation()


def build(config: GANConfig, data: ImagesInLanes) -> ImageGAN:
    """The objective of a run. Raises UserError as `_build` does, and where there are no such labels."""
    names = data.classes if config.model.classes else None
    if config.model.classes and (names is None or len(names) != config.model.classes):
        found = "no labels (data.labels true reads them)" if names is None else f"{len(names)} classes"
        raise UserError(f"model.classes: {config.model.classes}, but data.source {config.data.source} has {found}"
                        + (f"; set model.classes {len(names)}" if names else ""))
    if config.model.architecture == "mlp":
        check_batch(config.train, (config.model.generator_norm, config.model.discriminator_norm))
    objective = _build(config, names)
    objective.loss_unit = distance_units(len(data.validation()), RandomFeatures.width)
    return objective


def restore(config: GANConfig, folder: Path) -> ImageGAN:
    """The objective of a trained run."""
    return _build(config, _class_names(folder / CLASSES_FILE, config.model.classes) if config.model.classes else None)


def blueprint(config: GANConfig) -> Blueprint:
    """What a step is planned of. Raises UserError as `_build` does."""
    data, classes = config.data, config.model.classes
    if config.model.architecture == "mlp":
        check_batch(config.train, (config.model.generator_norm, config.model.discriminator_norm))
    shape = (data.channels * data.stack, data.size, data.size)
    sample = {"image": torch.empty((data.pack, *shape) if data.pack > 1 else shape, dtype=torch.uint8, device="meta")}
    if classes:
        sample["label"] = torch.empty((), dtype=torch.int64, device="meta")
    return Blueprint(_build(config, [str(number) for number in range(classes)] if classes else None), sample)


def _class_names(file: Path, classes: int) -> list[str]:
    """As the run has kept them; numbers for a run that has not. Raises UserError."""
    try:
        names = read_json(file)
    except FileNotFoundError:
        return [str(i) for i in range(classes)]
    except (OSError, Unreadable) as error:
        raise UserError(f"{file} cannot be read: {error}; remove it to have classes by number") from None
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} does not hold the names of {classes} classes; remove it to have them by number")
    return names


def _build(config: GANConfig, class_names: list[str] | None) -> ImageGAN:
    """Networks and objective.

    Raises:
        UserError: networks that cannot make such images, or losses that they do not suit.
    """
    model, data = config.model, config.data
    shape = (data.channels * data.stack, data.size, data.size)
    check_gan(model, shape)
    check_losses(config.objective, model.discriminator_norm, model.spectral_norm)
    if data.pack > 1 and model.classes:
        raise UserError(f"data.pack: {data.pack} images of different classes in a pack cannot be joined with model.classes "
                        f"{model.classes}; set data.pack 1, or leave model.classes out")
    generator, discriminator = NETWORKS[model.architecture]
    with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
        networks = generator(model, shape), discriminator(model, (shape[0] * data.pack, *shape[1:]))
    return ImageGAN(*networks, config.objective, image_shape=shape, class_names=class_names, seed=config.run.seed,
                    latent=model.latent, pack=data.pack, initial_std=INITIAL_STD if model.architecture == "dcgan" else None)
