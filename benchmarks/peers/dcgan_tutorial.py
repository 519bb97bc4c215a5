"""PyTorch's DCGAN tutorial: its networks and its loop, in fp32, over images that are in memory already
(https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html).

    python dcgan_tutorial.py --batch 128
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE, LATENT, WIDTH = 64, 100, 64
LR, BETAS = 2e-4, (0.5, 0.999)


def networks() -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator, written out."""
    w = WIDTH
    up = [nn.ConvTranspose2d(LATENT, 8 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * w), nn.ReLU(True)]
    for a, b in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)):
        up += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    down = [nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for a, b in ((w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
        down += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    both = (nn.Sequential(*up, nn.ConvTranspose2d(w, 3, 4, 2, 1, bias=False), nn.Tanh()),
            nn.Sequential(*down, nn.Conv2d(8 * w, 1, 4, 1, 0, bias=False), nn.Sigmoid()))
    for network in both:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
    return both


def images(size: int, channels: int) -> Tensor:
    """scikit-learn's digits, `(1797, channels, size, size)`, in [0, 1]."""
    factor = size // 8
    pixels = np.kron(load_digits().images / 16, np.ones((1, factor, factor)))
    return torch.from_numpy(pixels).float()[:, None].expand(-1, channels, -1, -1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, required=True)
    count = parser.parse_args().batch
    generator, discriminator = networks()
    criterion = nn.BCELoss()
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=LR, betas=BETAS)
    of_generator = torch.optim.Adam(generator.parameters(), lr=LR, betas=BETAS)
    reals = images(SIZE, 3) * 2 - 1
    for step in range(10**6):
        start = step * count % (len(reals) - count)
        real = reals[start : start + count]
        discriminator.zero_grad()
        label = torch.full((count,), 1.0)
        real_loss = criterion(discriminator(real).view(-1), label)
        real_loss.backward()
        fake = generator(torch.randn(count, LATENT, 1, 1))
        label.fill_(0.0)
        fake_loss = criterion(discriminator(fake.detach()).view(-1), label)
        fake_loss.backward()
        of_discriminator.step()
        generator.zero_grad()
        label.fill_(1.0)
        loss = criterion(discriminator(fake).view(-1), label)
        loss.backward()
        of_generator.step()
        losses = (real_loss + fake_loss).item(), loss.item()  # the tutorial keeps them at every step
        if step % 10 == 0:
            print(f"discriminator {losses[0]:.4f}, generator {losses[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
