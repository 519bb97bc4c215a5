"""`genscale sample` for the image families: samples, or one picture of walks between latents or of what a VAE has learnt."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from genscale.data.images.data import ImageData
from genscale.data.images.labels import composed
from genscale.errors import UserError, nearest
from genscale.evaluation.image_generation import decoded, latents, maker_of_images
from genscale.evaluation.sample_files import empty_folder, picture_of_run, write_images_npz, write_picture, write_pictures
from genscale.evaluation.settings import ImageSampling
from genscale.evaluation.trained_run import TrainedRun
from genscale.models.image_grid import grid, tile_scale
from genscale.models.lettering import class_captions
from genscale.objectives.capabilities import EncodesImages, missing_members
from genscale.rng import permutation

MOST_CLASS_COLUMNS = 16
"""With more classes than this, each image has its own label, not each column."""
TRAVERSED = 3.0
"""How far a latent dimension is moved to either side, in standard deviations of the prior."""
EXAMPLES_FOR_ACTIVITY = 256
MOST_PIXELS = 178_956_970
"""Most pixels of a picture; Pillow and others refuse to open larger ones."""


@dataclass(frozen=True)
class Sheet:
    """What a mode draws: latents and classes by tile, texts above the tiles, names of the rows."""

    latents: Tensor
    columns: int
    texts: Sequence[str] | None = None
    labels: Tensor | None = None
    rows: Sequence[str] | None = None


def sample_images(run: TrainedRun, settings: ImageSampling) -> None:
    """Write the picture or the samples, and say where.

    Raises:
        UserError: a mode that the family lacks, an unknown class, settings that do not go together, or a file that cannot be
            written.
    """
    mode = _mode(run, settings)
    only = _class_number(run, settings.label)
    out = Path(settings.out) if settings.out else None
    if settings.files:
        folder = Path(settings.files)
        empty_folder(folder)
        numbers = _classes(run, settings, only)
        write_pictures(folder, _batches(run, settings, numbers), settings.count, _names(run, numbers))
        print(f"{folder} ({settings.count:,} images)")
    if out is not None and out.suffix == ".npz":
        numbers = _classes(run, settings, only)
        write_images_npz(out, _batches(run, settings, numbers), (settings.count, *maker_of_images(run).image_shape),
                         _names(run, numbers), None if numbers is None else numbers.numpy())
        print(f"{out} ({settings.count:,} images)")
    elif out is not None or not settings.files:
        _check_size(run, settings)
        picture = {"sample": _samples, "interpolate": _walks, "reconstruct": _reconstructions,
                   "traverse": _traversals}[mode](run, settings, only)
        file = out or picture_of_run(run.folder, f"{mode}-seed{settings.seed}")
        write_picture(file, picture)
        height, width, _ = picture.shape
        print(f"{file} ({width} x {height} pixels)")


def _mode(run: TrainedRun, settings: ImageSampling) -> str:
    modes = [mode for mode in ("interpolate", "reconstruct", "traverse") if getattr(settings, mode)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]}: cannot be joined with --{modes[1]}; leave one out")
    if modes and modes[0] != "interpolate" and missing_members(EncodesImages, run.objective):
        raise UserError(f"--{modes[0]}: a run of model.family {run.config.model.family} has no encoder; leave it out, or "
                        "sample a run of family vae")
    arrays = settings.out is not None and Path(settings.out).suffix == ".npz"
    if settings.files or arrays:
        flag = f"--files {settings.files}" if settings.files else f"--out {settings.out}"
        if modes:
            raise UserError(f"--{modes[0]}: makes one picture, and {flag} asks for single samples; leave one of them out")
        if arrays or not settings.out:
            for name in ("columns", "scale"):
                if (value := getattr(settings, name)) is not None:
                    raise UserError(f"--{name}: {value} is about a picture, and {flag} makes none; leave it out, or add --out "
                                    "picture.png")
    return modes[0] if modes else "sample"


def _check_size(run: TrainedRun, settings: ImageSampling) -> None:
    """Raises UserError for a picture that nothing could show."""
    _, height, width = maker_of_images(run).image_shape
    scale = settings.scale or tile_scale(height, width)
    most = MOST_PIXELS // (height * width * scale**2)
    if settings.count > most:
        smaller = math.isqrt(MOST_PIXELS // (settings.count * height * width))
        fewer = [f"--count {most}"] if most else []
        fewer += [f"--scale {smaller}"] if settings.scale and smaller else []
        raise UserError(f"--count: {settings.count} images of {width * scale} x {height * scale} pixels make a picture of more "
                        f"than {MOST_PIXELS:,} pixels, which programs refuse to open; nearest allowed: "
                        f"{' or '.join(fewer)}, or single files (--files)")


def _classes(run: TrainedRun, settings: ImageSampling, only: int | None) -> Tensor | None:
    """Number of the class of each sample, in turn where none was asked for, int64 `(count,)`; None where there are none."""
    names = maker_of_images(run).class_names
    if names is None:
        return None
    numbers = torch.arange(settings.count)
    return numbers % len(names) if only is None else torch.full_like(numbers, only)


def _names(run: TrainedRun, numbers: Tensor | None) -> list[str] | None:
    names = maker_of_images(run).class_names
    return None if numbers is None or names is None else [names[number] for number in numbers.tolist()]


def _batches(run: TrainedRun, settings: ImageSampling, labels: Tensor | None) -> Iterator[Tensor]:
    """The samples, a batch at a time, uint8 `(batch, channels, height, width)`."""
    for numbers in torch.arange(settings.count).split(settings.batch_size):
        drawn = latents(maker_of_images(run), settings.seed, numbers)
        yield from decoded(run, drawn, None if labels is None else labels[numbers], settings.batch_size)


def _class_number(run: TrainedRun, name: str | None) -> int | None:
    if name is None:
        return None
    names = maker_of_images(run).class_names
    if names is None:
        raise UserError(f"--label: {name}, but the run is not conditional on classes; leave it out")
    known = [composed(each) for each in names]
    if name not in names and composed(name) not in known:
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UserError(f"--label: '{name}' is no class of the run{nearest(name, names)}; it has {shown}")
    return names.index(name) if name in names else known.index(composed(name))


def _captions(run: TrainedRun) -> list[str]:
    """What stands for each class; what cannot be drawn is said."""
    captions, problem = class_captions(maker_of_images(run).class_names or [])
    if problem:
        print(f"warning: {problem}", file=sys.stderr)
    return captions


def _samples(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    labels, numbers = _classes(run, settings, only), torch.arange(settings.count)
    drawn = latents(maker_of_images(run), settings.seed, numbers)
    if labels is None:
        return _drawn(run, settings, Sheet(drawn, _columns(settings)))
    captions = _captions(run)
    if only is not None:
        texts = [captions[only]] + [""] * (settings.count - 1)
        return _drawn(run, settings, Sheet(drawn, _columns(settings), texts, labels))
    by_column = settings.columns in (None, len(captions)) and len(captions) <= MOST_CLASS_COLUMNS
    columns = len(captions) if by_column else _columns(settings)
    texts = [captions[label] if i < columns or not by_column else "" for i, label in enumerate(labels.tolist())]
    return _drawn(run, settings, Sheet(drawn, columns, texts, labels))


def _walks(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    rows, columns = _rows_and_columns(settings)
    if columns == 1:
        raise UserError("--columns: 1 has room for one end of a walk alone; give at least 2 to --interpolate")
    ends = latents(maker_of_images(run), settings.seed, torch.arange(2 * rows))
    shares = torch.linspace(0, 1, columns)
    points = torch.cat([spherical(ends[2 * row], ends[2 * row + 1], shares) for row in range(rows)])
    texts = [f"{share:.2f}" for share in shares.tolist()] + [""] * ((rows - 1) * columns)
    if maker_of_images(run).class_names is None:
        return _drawn(run, settings, Sheet(points, columns, texts))
    captions = _captions(run)
    classes = [row % len(captions) if only is None else only for row in range(rows)]
    return _drawn(run, settings, Sheet(points, columns, texts, torch.tensor(classes).repeat_interleave(columns),
                                       [captions[label] for label in classes]))


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


@torch.no_grad()
def _reconstructions(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    inputs, labels = _validation_images(run, settings, max(1, settings.count // 2), only)
    means, _ = _encoded(run, inputs, settings.batch_size)
    outputs = torch.cat(list(decoded(run, means, labels, settings.batch_size)))
    columns = min(settings.columns or _even_columns(2 * len(inputs)), len(inputs))
    tiles, rows = [], []
    for start in range(0, len(inputs), columns):
        for word, images in (("input", inputs), ("output", outputs)):
            row = images[start : start + columns]
            blank = torch.full((columns - len(row), *row.shape[1:]), 255, dtype=torch.uint8)
            tiles.append(torch.cat([row, blank]))
            rows.append(word)
    return grid(torch.cat(tiles), columns, scale=settings.scale, rows=rows)


@torch.no_grad()
def _traversals(run: TrainedRun, settings: ImageSampling, only: int | None) -> np.ndarray:
    images, labels = _validation_images(run, settings, EXAMPLES_FOR_ACTIVITY, only)
    means, _ = _encoded(run, images, settings.batch_size)
    means = means.flatten(1)
    activity, order = means.var(0, correction=0).sort(descending=True)
    rows, columns = _rows_and_columns(settings)
    rows, values = min(rows, len(order)), max(3, columns - 1 | 1)  # an odd number has 0 in its middle
    columns = 1 + values
    points = means[:1].repeat(rows * columns, 1)
    moved = torch.linspace(-TRAVERSED, TRAVERSED, values)
    for row, dimension in enumerate(order[:rows].tolist()):
        points[row * columns + 1 : (row + 1) * columns, dimension] = moved
    texts = ["not moved", *(f"{value:+.1f}" if value else "0.0" for value in moved.tolist())] + [""] * ((rows - 1) * columns)
    active = (activity > 0.01).sum().item()
    print(f"{active} of {len(order)} latent dimensions are active", file=sys.stderr)
    labels = None if labels is None else labels[:1].repeat(rows * columns)
    names = [f"z{dimension}" for dimension in order[:rows].tolist()]
    return _drawn(run, settings, Sheet(points.view(-1, *maker_of_images(run).latent_shape), columns, texts, labels, names))


def _validation_images(run: TrainedRun, settings: ImageSampling, count: int,
                       only: int | None) -> tuple[Tensor, Tensor | None]:
    """uint8 images of the validation set, chosen by the seed, and their classes where the run is conditional."""
    samples = ImageData(run.config.data, run.config.run.seed, for_training=False).validation()
    if only is not None:
        samples = [sample for sample in samples if int(sample["label"]) == only]
        if not samples:
            raise UserError(f"--label: the validation set has no image of {settings.label}; choose another class")
    chosen = [samples[i] for i in permutation(len(samples), settings.seed, "reconstruct")[:count]]
    labels = torch.tensor([int(sample["label"]) for sample in chosen]) if maker_of_images(run).class_names else None
    return torch.from_numpy(np.stack([sample["image"] for sample in chosen])), labels


def _encoded(run: TrainedRun, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Means and logarithms of the variances of the posteriors, on the CPU."""
    objective = cast(EncodesImages, run.objective)  # else there is no such mode
    parts = [objective.encode(run.networks, part.to(run.device)) for part in images.split(batch_size)]
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
    return grid(images, sheet.columns, sheet.texts, settings.scale, sheet.rows)
