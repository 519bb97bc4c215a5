"""`genscale evaluate` for the image families: how good and how varied generated images are, and what each score is worth."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.grouped import ImagesInLanes, gan_images
from genscale.data.images.labels import composed
from genscale.data.images.settings import PackedImageDataSettings
from genscale.data.lanes import Sample
from genscale.data.order import LaneReader
from genscale.errors import UserError
from genscale.evaluation.classifier import Classifier, trained_classifier
from genscale.evaluation.image_generation import as_uint8, decoded, latents, maker_of_images
from genscale.evaluation.inception import InceptionFeatures
from genscale.evaluation.settings import ImageScoring
from genscale.evaluation.trained_run import TrainedRun
from genscale.models.feature_network import RandomFeatures
from genscale.objectives.sample_quality import (
    NEIGHBOURS,
    class_histogram,
    diversity,
    frechet_distance,
    kernel_distance,
    memorisation_rate,
    missing_classes,
    precision_recall_density_coverage,
)
from genscale.rng import Draws, permutation

MOST_FAKES = 10_000
TRAINING_IMAGES = 10_000
"""Training images at most that generated ones are compared with for memorisation."""
MEMORISATION_QUANTILE = 0.05
SHOWN_AFTER_SECONDS = 2.0
SHOWN_CLASSES = 12
FeatureNetwork = Classifier | RandomFeatures | InceptionFeatures


class TooFewImages(UserError):
    """Fewer than the scores of generated images take."""


def score_images(run: TrainedRun, settings: ImageScoring) -> dict[str, Any]:
    """Every score with its protocol and two anchors: what the same scores say of one half of the real images against the
    other, and of uniform noise against real images.

    Raises:
        TooFewImages: the features take more.
        UserError: features that cannot be had.
    """
    data, kind = _data_and_kind(run, settings)
    reals = data.validation()
    count = settings.count or min(len(reals), MOST_FAKES)
    _check_counts(kind, count, len(reals))
    network = _network(kind, data, run, settings)
    total = len(reals) + 2 * count + _training_count(data)
    with tqdm(total=total, desc="images", unit="image", delay=SHOWN_AFTER_SECONDS, disable=None, file=sys.stderr) as bar:
        features = _Features(network, run.device, bar)
        real = features(_batches(reals, settings.batch_size))
        fake = features(_fakes(run, settings, reals, count))
        noise = features(_noise(run, settings, count))
        training = features(_batches(_training_samples(data), settings.batch_size))
    halves = real[torch.from_numpy(permutation(len(real), 0, "halves"))].tensor_split(2)
    report: dict[str, Any] = {"protocol": _protocol(run, settings, network, real, fake, training),
                              **_scores(network, real, fake)}
    report["diversity"] = diversity(real, fake)
    report["memorisation_rate"] = memorisation_rate(training, real, fake, MEMORISATION_QUANTILE)
    if isinstance(network, Classifier):
        report["protocol"]["classifier_accuracy"] = network.accuracy(reals)
        report |= _classes(network, data.classes or [], real, fake)
    report["anchors"] = {"real_halves": {"images": [len(half) for half in halves], **_scores(network, *halves)},
                         "noise": {"images": [len(real), len(noise)], **_scores(network, real, noise)}}
    data.close()
    return report


def classifier_of(run: TrainedRun) -> tuple[Classifier, list[str]]:
    """The classifier of a run's images, the one that scores them, and the names of its classes. Raises UserError: it has no
    labels."""
    data, _ = _data_and_kind(run, ImageScoring(features="classifier"))
    try:
        return trained_classifier(data, len(data.classes or []), _kept_beside(run), run.device), list(data.classes or [])
    finally:
        data.close()


def _data_and_kind(run: TrainedRun, settings: ImageScoring) -> tuple[ImagesInLanes, str]:
    """The run's images as they are, with labels where the classifier is to know them, and the name of the features."""
    kind, names = _chosen_features(run, settings), maker_of_images(run).class_names
    crop = "none" if run.config.data.crop == "none" else "center"
    plain = dataclasses.replace(run.config.data, flip=False, crop=crop)
    # The seed is no run's: images and classifier are the same for all seeds, so that their scores compare.
    if kind in (None, "classifier"):
        try:
            return _opened(dataclasses.replace(plain, labels=True), names), "classifier"
        except UserError:
            if kind is not None or plain.labels:
                raise
    return _opened(dataclasses.replace(plain, labels=names is not None), names), kind or "random"


def _opened(settings: ImageDataSettings, class_names: list[str] | None) -> ImagesInLanes:
    """The images one by one; of a conditional run its classes, or what it generates of each would be another's."""
    data = ImageData(settings, 0)
    class_names = class_names and [composed(name) for name in class_names]
    classes = data.classes or []
    if class_names is not None and classes != class_names:
        first = next((number for number, pair in enumerate(zip(classes, class_names, strict=False))
                      if pair[0] != pair[1]), min(len(classes), len(class_names)))
        start = max(0, first - SHOWN_CLASSES + 1)
        found, known = (("..., " if start else "") + ", ".join(names[start : start + SHOWN_CLASSES])
                        + (", ..." if len(names) > start + SHOWN_CLASSES else "") for names in (classes, class_names))
        raise UserError(f"data.source: {settings.source} has the classes {found}, and the run was trained on {known}; give "
                        "images of the same classes")
    if isinstance(settings, PackedImageDataSettings) and settings.stack > 1:
        return gan_images(data, dataclasses.replace(settings, pack=1))
    return data


def _chosen_features(run: TrainedRun, settings: ImageScoring) -> str | None:
    """None where the images decide."""
    kind = settings.features or ("inception" if settings.inception else None)
    if kind == "inception" and settings.inception is None:
        raise UserError("--features: inception needs the file of its weights; name it with --inception FILE")
    if kind != "inception" and settings.inception is not None:
        raise UserError(f"--features: {kind} does not need --inception {settings.inception}; leave one of them out")
    stack = getattr(run.config.data, "stack", 1)
    if kind == "classifier" and stack > 1:
        raise UserError(f"--features: a classifier finds one class in an image, and data.stack is {stack}; use random")
    return "random" if kind is None and stack > 1 else kind


def _kept_beside(run: TrainedRun) -> Path:
    return run.folder.resolve().parent / "classifiers"


def _network(kind: str, data: ImagesInLanes, run: TrainedRun, settings: ImageScoring) -> FeatureNetwork:
    if kind == "classifier":
        return trained_classifier(data, len(data.classes or []), _kept_beside(run), run.device)
    if kind == "random":
        return RandomFeatures().to(run.device)
    assert settings.inception is not None  # or `_chosen_features` has refused
    return InceptionFeatures(settings.inception).to(run.device)


def _check_counts(kind: str, count: int, reals: int) -> None:
    width = {"classifier": Classifier.width, "random": RandomFeatures.width, "inception": InceptionFeatures.width}[kind]
    for key, number in (("data.validation_images", reals), ("--count", count)):
        if number <= width:
            more = ", as --on SOURCE gives (or data.validation_fraction)" if number == reals else ""
            raise TooFewImages(f"{key}: {number} images are too few for the {width} features of {kind}, whose covariance they "
                               f"leave singular; at least {width + 1} are needed{more}")


class _Features:
    """Batches of uint8 images to their features `(n, width)`, on the CPU."""

    def __init__(self, network: FeatureNetwork, device: torch.device, bar: tqdm) -> None:
        self.network, self.device, self.bar = network, device, bar

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor]) -> Tensor:
        parts = []
        for batch in batches:
            parts.append(self.network(batch.to(self.device).float() / 255).cpu())
            self.bar.update(len(batch))
        return torch.cat(parts)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[Tensor]:
    remaining = iter(samples)
    while part := list(itertools.islice(remaining, size)):
        yield torch.from_numpy(np.stack([sample["image"] for sample in part]))


def _training_samples(data: ImagesInLanes) -> Iterator[Sample]:
    """The first training images of the order."""
    reader = LaneReader(data, {})
    for number in range(_training_count(data)):
        yield reader.read(number)[0]


def _training_count(data: ImagesInLanes) -> int:
    """Each once, where their number is known."""
    return min(TRAINING_IMAGES, data.order.count or TRAINING_IMAGES)


def _fakes(run: TrainedRun, settings: ImageScoring, reals: list[Sample], count: int) -> Iterator[Tensor]:
    """Where the run is conditional, the classes are those of the real images in a random order."""
    labels, order = None, permutation(len(reals), settings.seed, "labels")
    if maker_of_images(run).class_names is not None:
        labels = torch.tensor([int(reals[order[number % len(reals)]]["label"]) for number in range(count)])
    for start in range(0, count, settings.batch_size):
        numbers = torch.arange(start, min(start + settings.batch_size, count))
        drawn = latents(maker_of_images(run), settings.seed, numbers)
        yield from decoded(run, drawn, None if labels is None else labels[numbers], settings.batch_size)


def _noise(run: TrainedRun, settings: ImageScoring, count: int) -> Iterator[Tensor]:
    for start in range(0, count, settings.batch_size):
        numbers = torch.arange(start, min(start + settings.batch_size, count))
        yield as_uint8(Draws(settings.seed, "noise", 0, numbers).uniform("pixels", *maker_of_images(run).image_shape))


def _protocol(run: TrainedRun, settings: ImageScoring, network: FeatureNetwork, real: Tensor, fake: Tensor,
              training: Tensor) -> dict[str, Any]:
    channels, size, _ = maker_of_images(run).image_shape
    return {"features": network.name, "features_sha256": network.identity(), "features_width": network.width,
            "real_images": len(real), "real_split": "validation", "generated_images": len(fake),
            "training_images": len(training), "size": size, "channels": channels,
            "dtype": "images uint8, networks float32, scores float64", "seed": settings.seed,
            "weights": "averaged" if run.averaged else "live", "batch_size": settings.batch_size,
            "neighbours": NEIGHBOURS, "memorisation_quantile": MEMORISATION_QUANTILE}


def _scores(network: FeatureNetwork, real: Tensor, fake: Tensor) -> dict[str, float | None]:
    """None for a Frechet distance that an anchor has too few images for."""
    enough = min(len(real), len(fake)) > network.width
    kid, error = kernel_distance(real, fake)
    return {"fid" if network.name == "inception" else "fd": frechet_distance(real, fake) if enough else None,
            "kid": kid, "kid_standard_error": error, **precision_recall_density_coverage(real, fake)}


@torch.no_grad()
def _classes(network: Classifier, names: list[str], real: Tensor, fake: Tensor) -> dict[str, Any]:
    """How many of the images the classifier puts into each class."""
    device = network.head.weight.device
    counts = {kind: class_histogram(network.head(features.to(device)).argmax(1).cpu(), len(names))
              for kind, features in (("generated", fake), ("real", real))}
    return {"class_histogram": dict(zip(names, counts["generated"], strict=True)),
            "real_class_histogram": dict(zip(names, counts["real"], strict=True)),
            "missing_classes": missing_classes(counts["generated"], names)}
