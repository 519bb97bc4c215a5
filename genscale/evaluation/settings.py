"""The flags of `genscale sample` and `genscale evaluate` that are a family's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt


@dataclass
class TextSampling:
    """What to write."""

    prompt: str = ""
    """Text to go on from (empty: the start of a document)."""
    prompts: str | None = None
    """File of prompts, one a line (blank lines are skipped), written many side by side."""
    tokens: int = 200
    """Tokens to add at most; a text ends earlier where its document does."""
    temperature: float = 0.8
    """Below 1 is safer, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw from this many likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this probability only."""
    seed: int = 0
    """Same seed, same text; text i of a prompt depends on the prompt, the seed and i alone."""
    count: int = 1
    """Texts to write (with prompts: for each)."""


@dataclass
class ImageSampling:
    """What to draw."""

    count: PositiveInt = 64
    """Images in the picture, about, where it has whole rows; exactly, of files and .npz."""
    seed: NonNegativeInt = 0
    """Same seed, same images; image i depends on the seed and i alone."""
    out: str | None = None
    """File to write: a picture, .png or what else pillow writes (default: <run folder>/samples/sample-seed<seed>.png), or .npz
    with the samples as arrays (images, labels; the same as arr_0, arr_1 for other tools), which data.source reads."""
    files: str | None = None
    """Folder, new or empty, to write each sample into as a file: 00000.png, or 00000-<class>.png of a conditional run."""
    label: str | None = None
    """Draw this class only, by name (of a conditional run)."""
    columns: PositiveInt | None = None
    """Images in a row (default: a column for each class, or as square as can be)."""
    scale: PositiveInt | None = None
    """Each pixel of an image becomes a square of this side (default: the least that makes images of 32 pixels)."""
    interpolate: bool = False
    """Each row is a walk from one latent to another, along the sphere (White 2016)."""
    reconstruct: bool = False
    """Validation images, and below each what the autoencoder makes of it."""
    traverse: bool = False
    """Each row moves one latent dimension of a validation image from -3 to 3, beside the image with none moved, the most active
    dimension first."""
    live: bool = False
    """The weights as trained, not their average."""
    batch_size: PositiveInt = 64
    """Images in one forward pass."""


@dataclass
class PreviewSampling:
    """What to draw: what the run itself draws while it trains."""

    seed: NonNegativeInt = 0
    """Same seed, same sample."""
    out: str | None = None
    """File to write where it is a picture, .png or what else pillow writes (default: <run
    folder>/samples/sample-seed<seed>.png)."""
    live: bool = False
    """The weights as trained, not their average."""


@dataclass
class PointSampling:
    """What to draw."""

    count: PositiveInt = 1000
    """Points."""
    seed: NonNegativeInt = 0
    """Same seed, same points; point i depends on the seed and i alone."""
    out: str | None = None
    """File to write: a picture, .png or what else pillow writes (default: <run folder>/samples/sample-seed<seed>.png), .csv
    with columns x and y, or .npz with the array points (and the same as arr_0)."""
    live: bool = False
    """The weights as trained, not their average."""
    batch_size: PositiveInt = 4096
    """Points in one forward pass."""


@dataclass
class ImageScoring:
    """How to score generated images."""

    count: PositiveInt | None = None
    """Images to generate (default: as many as there are validation images, at most 10,000)."""
    seed: NonNegativeInt = 0
    """Same seed, same images, for any batch size."""
    features: Literal["classifier", "random", "inception"] | None = None
    """classifier: of these images, trained on the training split in a minute and kept beside the run folder; random: a
    convolutional network with fixed random weights; inception: see --inception (default: classifier where the images have
    labels, else random)."""
    inception: str | None = None
    """File of Inception's weights, pt_inception-2015-12-05-6726825d.pth; the Frechet distance is then called fid."""
    importance_samples: PositiveInt | None = None
    """A VAE's: estimate the log-likelihood with this many importance samples an image."""
    live: bool = False
    """The weights as trained, not their average."""
    batch_size: PositiveInt = 64
    """Images in one forward pass."""
