"""A small diffusion model (Ho et al. 2020, "Denoising Diffusion Probabilistic Models") on squares and discs of 8 by 8 pixels.

    python docs/examples/own_diffusion.py train --train.steps 300
    accelerate launch docs/examples/own_diffusion.py train --parallel.strategy zero2 ...

Noise and noise levels are drawn from `draws`, whose numbers belong to a sample: any number of processes draws the same ones.
"""

import numpy as np
import torch
from torch import nn

import genscale
from genscale.models.image_grid import grid
from genscale.rng import Draws

SIZE, LEVELS = 8, 100
KEPT = torch.cos(torch.linspace(0.01, 0.99, LEVELS) * torch.pi / 2).square()  # share of the image at each level of noise


class Shapes(torch.utils.data.Dataset):
    """1024 squares and discs, each of them once, fp32 (1, 8, 8) between -1 and 1."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> torch.Tensor:
        x, y = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy")
        left, up = x - index % 4 - 2, y - index // 4 % 4 - 2
        disc, radius = index // 16 % 2, 1 + index // 32 / 16
        distance = (left**2 + up**2).sqrt() if disc else torch.maximum(left.abs(), up.abs())
        return (radius - distance + 0.5).clamp(0, 1)[None] * 2 - 1


class Denoiser(nn.Module):
    """Says which noise is in an image (batch, 1, 8, 8) at a level (batch,) from 0 to 99."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.level = nn.Embedding(LEVELS, width)
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.leave = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images, levels):
        hidden = self.enter(images) + self.level(levels)[:, :, None, None]
        for layer, norm in zip(self.middle, self.norms, strict=True):
            hidden = hidden + layer(nn.functional.silu(norm(hidden)))
        return self.leave(hidden)


def loss(network, batch, draws):
    levels = (draws.uniform("level") * LEVELS).long()
    noise = draws.normal("noise", 1, SIZE, SIZE)
    kept = KEPT.to(noise.device)[levels][:, None, None, None]
    noisy = kept.sqrt() * batch["x"] + (1 - kept).sqrt() * noise
    return (network(noisy, levels) - noise).square().flatten(1).mean(1)  # one value a sample


def preview(network, seed: int, device: torch.device) -> np.ndarray:
    """Images from pure noise, a level at a time (Song et al. 2021, without noise on the way)."""
    images = Draws(seed, "preview", 0, torch.arange(16), device).normal("noise", 1, SIZE, SIZE)
    for level in reversed(range(LEVELS)):
        kept, before = KEPT[level], KEPT[level - 1] if level else torch.tensor(1.0)
        noise = network(images, torch.full((16,), level, device=device)).float()
        clean = ((images - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
        images = before.sqrt() * clean + (1 - before).sqrt() * noise
    return grid((images + 1) / 2)


def data(settings, seed: int) -> genscale.MapData:
    return genscale.MapData(Shapes(), validation=128, seed=seed)


genscale.register(genscale.make_family(
    "own_diffusion", network=lambda model: Denoiser(), loss=loss, data=data, preview=preview, unit="images"))

if __name__ == "__main__":
    genscale.start()
