"""The `data` section of a run on images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt

DIGITS = "digits"
IMAGE_PIXELS = 89_478_485
IMAGE_BYTES = 2**28
ARRAY_BYTES = 2**33
HUB_SETTINGS = ["subset", "split"]
TABLE_SETTINGS = ["image_column", "label_column"]
"""Settings that only hub datasets, and only tables, heed."""


@dataclass(frozen=True)
class ImageDataSettings:
    """Images to train on."""

    source: list[str] | str = DIGITS
    """digits (scikit-learn's 1,797 handwritten digits of 8x8 pixels, no download), a .npz file (arrays images and labels) or a
    folder with train.npz, a folder of image files (class: the folder's name below the root), a .parquet file or a WebDataset
    .tar, local or by URL (https://..., streamed), a folder of these, the name of a source of an installed package (`genscale
    families` lists them) or of a Hugging Face hub dataset, or a list of parquet or tar files. A large source is read fastest in
    as many files as there are lanes."""
    options: dict[str, Any] | None = None
    """Settings of the source, where it is that of an installed package: {most: 99}."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    size: PositiveInt = 32
    """Height and width in pixels that images are brought to."""
    channels: Literal[1, 3] = 3
    """1: greyscale, 3: colour. Transparent images are laid on white."""
    value_range: tuple[float, float] | None = None
    """What is black and what is white in pictures of more than 8 bits (TIFF, 16-bit PNG, arrays), as in [0, 4095]; what lies
    outside is cut off. Default: read off the values of the source, and said in the log, or refused where they do not tell."""
    labels: bool = False
    """Samples have a class label."""
    class_names: list[str] | None = None
    """Names of the classes in the order of their numbers, where the source does not tell them. A label that is none of them
    counts them from 0, where none is called by a number."""
    image_column: str = "image"
    """Column of the images in parquet files and hub datasets."""
    label_column: str = "label"
    """Column of the labels there."""
    crop: Literal["none", "center", "random"] = "center"
    """What becomes of an image that is not square: its middle or a random part, once its shorter side is `size`; or none: the
    whole of it, stretched."""
    flip: bool = False
    """Mirror every other training image, by chance."""
    validation_source: list[str] | str | None = None
    """Source of the validation set. Default: the one that the source brings (test.npz, folders or files named train and val or
    test, a split of a hub dataset), else held-out images."""
    validation_fraction: OpenUnitInterval = 0.1
    """Share of the images held out for validation where there is no other validation set."""
    validation_images: PositiveInt = 1000
    """At most so many images of the validation set are used."""
    bad_share: ClosedUnitInterval = 0.01
    """Share of damaged images up to which others take their places; with more of them the run ends."""
    max_image_pixels: PositiveInt = IMAGE_PIXELS
    """An image of more pixels counts as damaged: it is not decoded."""
    max_image_bytes: PositiveInt = IMAGE_BYTES
    """An image whose file has more bytes counts as damaged. A .tar.gz that grows to more, and to over 200 times its size, is
    refused."""
    max_array_bytes: PositiveInt = ARRAY_BYTES
    """Most bytes of a .npz file's array in memory; a larger one is refused before it is read."""
    lanes: PositiveInt = 48
    """Parallel streams that make up the sample order, whatever the number of processes; reading is cheapest where it is a
    multiple of processes x workers."""
    window: PositiveInt = 64
    """Images shuffled together in a lane when the source is too large for memory; a smaller one is shuffled as a whole."""
    workers: NonNegativeInt = 0
    """Processes that load data for each training process (0: a background thread)."""
    prefetch_steps: PositiveInt = 2
    """Global batches to load ahead."""
    retry_minutes: NonNegativeFloat = 5.0
    """How long a web server that fails is tried again before the run ends; less than guards.hang_minutes."""


@dataclass(frozen=True)
class PackedImageDataSettings(ImageDataSettings):
    """Images for a GAN."""

    pack: PositiveInt = 1
    """Images that the discriminator sees together (Lin et al. 2018, PacGAN); a sample, and so the batch size, then counts
    packs."""
    stack: Literal[1, 3] = 1
    """Greyscale images laid over each other as the channels of one (3: the thousand modes of Stacked MNIST, Metz et al.
    2017)."""
