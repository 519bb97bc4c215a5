"""`genscale sample` for the image families: one picture of samples, of walks between latents, or of what a VAE has learnt."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import Tensor

from genscale.data.image_labels import composed
from genscale.data.images import ImageData
from genscale.errors import UserError, nearest
from genscale.evaluation.image_generation import decoded, latents
from genscale.evaluation.trained_run import TrainedRun
from genscale.models.image_grid import grid
from genscale.rng import permutation

MOST_CLASS_COLUMNS = 16
"""With more classes than this, each image has its own label, not each column."""
TRAVERSED = 3.0
"""How far a latent dimension is moved to either side, in standard deviations of the prior."""
EXAMPLES_FOR_ACTIVITY = 256


@dataclass
class ImageSampling:
    """What to draw."""

    count: PositiveInt = 64
    """Images in the picture, about, where it has whole rows."""
    seed: NonNegativeInt = 0
    """Same seed, same images; image i depends on the seed and i alone."""
    out: str | None = None
    """File to write, .png or what else pillow writes (default: <run folder>/samples/sample-seed<seed>.png)."""
    label: str | None = None
    """Draw this class only, by name (of a conditional run)."""
    columns: PositiveInt | None = None
    """Images in a row (default: a column for each class, or as square as can be)."""
    interpolate: bool = False
    """Each row is a walk from one latent to another, along the sphere (White 2016)."""
    reconstruct: bool = False
    """Validation images, and below each what the autoencoder makes of it."""
    traverse: bool = False
    """Each row moves one latent dimension of a validation image from -3 to 3, the most active dimension first."""
    live: bool = False
    """The weights as trained, not their average."""
    batch_size: PositiveInt = 64
    """Images in one forward pass."""


@dataclass(frozen=True)
class Sheet:
    """What a mode draws: latents and classes by tile, texts above the tiles, images that are there already."""

    latents: Tensor
    columns: int
    texts: list[str] | None = None
    labels: Tensor | None = None


def sample_images(run: TrainedRun, settings: ImageSampling) -> None:
    """Write the picture, and say where.

    Raises:
        UserError: a mode that the family lacks, an unknown class, or a file that cannot be written.
    """
    modes = [mode for mode in ("interpolate", "reconstruct", "traverse") if getattr(settings, mode)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]}: cannot be joined with --{modes[1]}; leave one out")
    mode = modes[0] if modes else "sample"
    if mode in ("reconstruct", "traverse") and not hasattr(run.objective, "encode"):
        raise UserError(f"--{mode}: a run of model.family {run.config.model.family} has no encoder; leave it out, or sample a "
                        "run of family vae")
    only = _class_number(run, settings.label)
    picture = {"sample": _samples, "interpolate": _walks, "reconstruct": _reconstructions,
               "traverse": _traversals}[mode](run, settings, only)
    name = f"{mode}-seed{settings.seed}.png"
    file = Path(settings.out) if settings.out else run.folder / "samples" / name
    _write(picture, file)
    height, width, _ = picture.shape
    print(f"{file} ({width} x {height} pixels)")


def _class_number(run: TrainedRun, name: str | None) -> int | None:
    if name is None:
        return None
    names = run.objective.class_names
    if names is None:
        raise UserError(f"--label: {name}, but the run is not conditional on classes; leave it out")
    known = [composed(each) for each in names]
    if name not in names and composed(name) not in known:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"--label: '{name}' is no class of the run{nearest(name, names)}; it has {shown}")
    return names.index(name) if name in names else known.index(composed(name))


def _samples(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    names, numbers = run.objective.class_names, torch.arange(settings.count)
    drawn = latents(run.objective, settings.seed, numbers)
    if names is None:
        return _drawn(run, settings, Sheet(drawn, _columns(settings)))
    if only is not None:
        texts = [names[only]] + [""] * (settings.count - 1)
        return _drawn(run, settings, Sheet(drawn, _columns(settings), texts, torch.full_like(numbers, only)))
    labels = numbers % len(names)
    by_column = settings.columns in (None, len(names)) and len(names) <= MOST_CLASS_COLUMNS
    columns = len(names) if by_column else _columns(settings)
    texts = [names[label] if i < columns or not by_column else "" for i, label in enumerate(labels.tolist())]
    return _drawn(run, settings, Sheet(drawn, columns, texts, labels))


def _walks(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    rows, columns = _rows_and_columns(settings)
    ends = latents(run.objective, settings.seed, torch.arange(2 * rows))
    shares = torch.linspace(0, 1, columns)
    points = torch.cat([spherical(ends[2 * row], ends[2 * row + 1], shares) for row in range(rows)])
    return _drawn(run, settings, Sheet(points, columns, *_labels_by_row(run, rows, columns, only)))


def spherical(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points `(n, *shape)` at these shares of the way from one latent to another, along the arc between them: as far from the
    origin as latents are, where a straight line would pass through lengths that are never drawn."""
    a, b = start.double().flatten(), end.double().flatten()
    angle = torch.arccos((torch.dot(a, b) / (a.norm() * b.norm())).clamp(-1, 1))
    shares = shares.double()[:, None]
    if angle.sin() < 1e-6:  # there is no arc
        points = (1 - shares) * a + shares * b
    else:
        points = (((1 - shares) * angle).sin() * a + (shares * angle).sin() * b) / angle.sin()
    return points.float().view(-1, *start.shape)


def _labels_by_row(run: TrainedRun, rows: int, columns: int, only: int | None) -> tuple[list[str] | None, Tensor | None]:
    names = run.objective.class_names
    if names is None:
        return None, None
    classes = [row % len(names) if only is None else only for row in range(rows)]
    texts = [names[label] if column == 0 else "" for label in classes for column in range(columns)]
    return texts, torch.tensor(classes).repeat_interleave(columns)


@torch.no_grad()
def _reconstructions(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    inputs, labels = _validation_images(run, settings, max(1, settings.count // 2), only)
    means, _ = _encoded(run, inputs, settings.batch_size)
    outputs = torch.cat(list(decoded(run, means, labels, settings.batch_size)))
    columns = min(settings.columns or _even_columns(2 * len(inputs)), len(inputs))
    tiles, texts = [], []
    for start in range(0, len(inputs), columns):
        for word, images in (("input", inputs), ("", outputs)):  # the word's room keeps the pairs apart
            row = images[start : start + columns]
            blank = torch.full((columns - len(row), *row.shape[1:]), 255, dtype=torch.uint8)
            tiles.append(torch.cat([row, blank]))
            texts += [word] + [""] * (columns - 1)
    return grid(torch.cat(tiles), columns, texts)


@torch.no_grad()
def _traversals(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    images, labels = _validation_images(run, settings, EXAMPLES_FOR_ACTIVITY, only)
    means, _ = _encoded(run, images, settings.batch_size)
    means = means.flatten(1)
    activity, order = means.var(0, correction=0).sort(descending=True)
    rows, columns = _rows_and_columns(settings)
    rows = min(rows, len(order))
    points = means[:1].repeat(rows * columns, 1)
    moved = torch.linspace(-TRAVERSED, TRAVERSED, columns)
    for row, dimension in enumerate(order[:rows].tolist()):
        points[row * columns : (row + 1) * columns, dimension] = moved
    texts = [f"z{order[row]}" if column == 0 else f"{moved[column]:+.1f}" if row == 0 else ""
             for row in range(rows) for column in range(columns)]
    active = (activity > 0.01).sum().item()
    print(f"{active} of {len(order)} latent dimensions are active", file=sys.stderr)
    labels = None if labels is None else labels[:1].repeat(rows * columns)
    return _drawn(run, settings, Sheet(points.view(-1, *run.objective.latent_shape), columns, texts, labels))


def _validation_images(run: TrainedRun, settings: ImageSampling, count: int,
                       only: int | None) -> tuple[Tensor, Tensor | None]:
    """uint8 images of the validation set, chosen by the seed, and their classes where the run is conditional."""
    samples = ImageData(run.config.data, run.config.run.seed, for_training=False).validation()
    if only is not None:
        samples = [sample for sample in samples if int(sample["label"]) == only]
        if not samples:
            raise UserError(f"--label: the validation set has no image of {settings.label}; choose another class")
    chosen = [samples[i] for i in permutation(len(samples), settings.seed, "reconstruct")[:count]]
    labels = torch.tensor([int(sample["label"]) for sample in chosen]) if run.objective.class_names else None
    return torch.from_numpy(np.stack([sample["image"] for sample in chosen])), labels


def _encoded(run: TrainedRun, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Means and logarithms of the variances of the posteriors, on the CPU."""
    parts = [run.objective.encode(run.objective.networks, part.to(run.device)) for part in images.split(batch_size)]
    means, log_variances = zip(*parts, strict=True)
    return torch.cat(means).float().cpu(), torch.cat(log_variances).float().cpu()


def _columns(settings: ImageSampling) -> int:
    return min(settings.columns or math.ceil(math.sqrt(settings.count)), settings.count)


def _even_columns(count: int) -> int:
    return max(1, 2 * round(math.sqrt(count) / 2))


def _rows_and_columns(settings: ImageSampling) -> tuple[int, int]:
    columns = settings.columns or max(2, round(math.sqrt(settings.count)))
    return max(1, settings.count // columns), columns


def _drawn(run: TrainedRun, settings: ImageSampling, sheet: Sheet) -> np.ndarray:
    images = torch.cat(list(decoded(run, sheet.latents, sheet.labels, settings.batch_size)))
    return grid(images, sheet.columns, sheet.texts)


def _write(picture: np.ndarray, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    except ValueError:
        raise UserError(f"--out: {file} has no ending that pillow knows; call it {file.with_suffix('.png').name}") from None
    except OSError as error:
        raise UserError(f"--out: {file} cannot be written ({error.strerror or error}); give another path") from None
