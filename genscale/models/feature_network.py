"""Features of images that need no trained weights: a convolutional network whose random weights never change."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.rng import numpy_generator

WIDTH = 64
CHANNELS = (32, 64, 64)
CELLS = 4
RECIPE = "genscale random features 1"


class RandomFeatures(nn.Module):
    """Images to `WIDTH` features through three strided random convolutions and a random projection.

    Random convolutions keep enough of an image for distances between sets of images to mean something without any data
    (Naeem et al. 2020, "Reliable fidelity and diversity metrics", use a random network for the same reason). The weights
    are the same in every run, on every machine and for any seed: `identity` proves it.
    """

    name = "random"
    width = WIDTH

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for i, outputs in enumerate(CHANNELS):
            self._draw(f"weight{i}", (outputs, inputs, 4, 4), math.sqrt(2 / (inputs * 16)))
            self._draw(f"bias{i}", (outputs,), 0.1)
            inputs = outputs
        self._draw("projection", (WIDTH, inputs * CELLS * CELLS), 1 / math.sqrt(WIDTH))

    def _draw(self, name: str, shape: tuple[int, ...], std: float) -> None:
        values = numpy_generator(0, RECIPE, name).standard_normal(shape, np.float32) * np.float32(std)
        self.register_buffer(name, torch.from_numpy(values))  # buffers: nothing here is ever trained

    def forward(self, images: Tensor) -> Tensor:
        """Features fp32 `(batch, WIDTH)` of images fp32 `(batch, channels, size, size)` in [0, 1], 1 or 3 channels; computed
        in fp32 under any autocast. Images up to 32 pixels are seen at 32, larger ones at 64."""
        size = 32 if images.shape[-1] <= 32 else 64
        with torch.autocast(images.device.type, enabled=False):
            hidden = 2 * images.float() - 1
            if hidden.shape[1] == 1:
                hidden = hidden.expand(-1, 3, -1, -1)
            if hidden.shape[-1] != size:
                hidden = F.interpolate(hidden, size=(size, size), mode="bilinear", antialias=hidden.shape[-1] > size)
            for i in range(len(CHANNELS)):
                weight, bias = self.get_buffer(f"weight{i}"), self.get_buffer(f"bias{i}")
                hidden = F.leaky_relu(F.conv2d(hidden, weight, bias, stride=2, padding=1), 0.2)
            return F.adaptive_avg_pool2d(hidden, CELLS).flatten(1) @ self.get_buffer("projection").T

    def identity(self) -> str:
        """SHA-256 of the recipe's name and the weights."""
        hashed = hashlib.sha256(RECIPE.encode())
        for name, values in sorted(self.named_buffers()):
            hashed.update(name.encode() + values.cpu().numpy().astype("<f4").tobytes())
        return hashed.hexdigest()
