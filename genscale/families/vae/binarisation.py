"""Black and white images from grey ones: each pixel is a Bernoulli draw with its intensity as the probability (Salakhutdinov
and Murray 2008)."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.models.dropout import mixed_words, random_words

STREAM = 0
FIXED_SET = 2008
"""Tells the draws of the fixed set apart from all others; the same for every run and seed."""


def binarised(images: Tensor, keys: Tensor) -> Tensor:
    """uint8 images of 0 and 255 alone, drawn from uint8 ones; probabilities are exact to 1/131072.

    Args:
        images: `(batch, channels, height, width)`.
        keys: `(batch,)` int64, what the draws of each image are made from.
    """
    flat = images.flatten(1)
    thresholds = (flat.float() * (2**16 / 255)).round().int() - 2**15
    white = random_words(keys, STREAM, flat.shape[1]).int() < thresholds
    return (white * 255).to(torch.uint8).reshape(images.shape)


def content_keys(images: Tensor) -> Tensor:
    """One 64-bit number `(batch,)` an image, from its pixels alone: equal images have equal keys wherever and whenever they
    come up, so that what is drawn from the key belongs to the image and stays for ever."""
    flat = images.flatten(1).long()
    positions = torch.arange(1, flat.shape[1] + 1, device=images.device) << 8
    return mixed_words(mixed_words(positions + flat).sum(1) + FIXED_SET)
