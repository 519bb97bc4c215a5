"""Our DCGAN-64 step against a plain loop as in PyTorch's DCGAN tutorial: same networks, batch and machine, taking turns.

    python benchmarks/dcgan_cpu.py --out benchmarks/results/dcgan-cpu.json

Ours is what `genscale train` does in a step: loader, both phases, clipping off, fused AdamW. Theirs is the tutorial's loop
(https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html): a batch of reals and one of fakes through the
discriminator, the same fakes once more for the generator, Adam, contiguous fp32 tensors; its images are in memory already.
The two alternate step by step. Compared: fp32 on both sides, and our default (bf16 where the CPU computes in it) against fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from our_step import OurSteps, compare_precisions, compared
from torch import Tensor, nn

from genscale.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.data.packed import PackedImageDataSettings
from genscale.models.gan_settings import GANSettings
from genscale.objectives.gan_settings import GANObjectiveSettings

SIZE, LATENT, WIDTH = 64, 100, 64
LR, BETAS = 2e-4, (0.5, 0.999)
WARMUP_STEPS = 2


def tutorial_networks() -> tuple[nn.Module, nn.Module]:
    """The tutorial's generator and discriminator, written out."""
    w = WIDTH
    up = [nn.ConvTranspose2d(LATENT, 8 * w, 4, 1, 0, bias=False), nn.BatchNorm2d(8 * w), nn.ReLU(True)]
    for a, b in ((8 * w, 4 * w), (4 * w, 2 * w), (2 * w, w)):
        up += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    down = [nn.Conv2d(3, w, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for a, b in ((w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
        down += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    networks = (nn.Sequential(*up, nn.ConvTranspose2d(w, 3, 4, 2, 1, bias=False), nn.Tanh()),
                nn.Sequential(*down, nn.Conv2d(8 * w, 1, 4, 1, 0, bias=False), nn.Sigmoid()))
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
    return networks


def tutorial_step(generator: nn.Module, discriminator: nn.Module) -> Callable[[Tensor], tuple[float, float]]:
    """One pass through the body of the tutorial's training loop."""
    criterion = nn.BCELoss()
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=LR, betas=BETAS)
    of_generator = torch.optim.Adam(generator.parameters(), lr=LR, betas=BETAS)

    def step(real: Tensor) -> tuple[float, float]:
        discriminator.zero_grad()
        label = torch.full((len(real),), 1.0)
        real_loss = criterion(discriminator(real).view(-1), label)
        real_loss.backward()
        fake = generator(torch.randn(len(real), LATENT, 1, 1))
        label.fill_(0.0)
        fake_loss = criterion(discriminator(fake.detach()).view(-1), label)
        fake_loss.backward()
        of_discriminator.step()
        generator.zero_grad()
        label.fill_(1.0)
        loss = criterion(discriminator(fake).view(-1), label)
        loss.backward()
        of_generator.step()
        return (real_loss + fake_loss).item(), loss.item()

    return step


def compare(precision: str, batch: int, steps: int) -> dict[str, Any]:
    config = Config(model=GANSettings(latent=LATENT, width=WIDTH), objective=GANObjectiveSettings(),
                    data=PackedImageDataSettings(size=SIZE, validation_images=179),
                    train=TrainSettings(steps=10**6, global_batch_size=batch, precision=precision, clip=0.0),
                    optimizer=OptimizerSettings(lr=LR, betas=BETAS, weight_decay=0.0),
                    schedule=ScheduleSettings(name="constant"))
    ours = OurSteps(config)
    generator, discriminator = tutorial_networks()
    parameters = sum(p.numel() for network in (generator, discriminator) for p in network.parameters())
    if parameters != ours.parameters:
        raise SystemExit(f"the networks are not the same: {ours.parameters:,} and {parameters:,} parameters")
    theirs = tutorial_step(generator, discriminator)
    seconds: dict[str, list[float]] = {"genscale": [], "tutorial": []}
    images = _images(ours, batch)
    for _ in range(WARMUP_STEPS + steps):
        started = time.perf_counter()
        theirs(images)
        seconds["tutorial"].append(time.perf_counter() - started)
        seconds["genscale"].append(ours().seconds)
    ours.close()
    return {"parameters": parameters, "batch": batch, "steps": steps,
            "precision": {"genscale": ours.precision, "tutorial": "fp32"}, **compared(seconds, WARMUP_STEPS)}


def _images(ours: OurSteps, count: int) -> Tensor:
    """fp32 images in [-1, 1], as the tutorial's loader gives them: the digits, of which our loader reads others."""
    samples = [torch.from_numpy(sample["image"]) for sample in ours.data.validation()]
    return torch.stack([samples[i % len(samples)] for i in range(count)]).float() / 127.5 - 1


if __name__ == "__main__":
    compare_precisions(__doc__.splitlines()[0], compare, batch=128)
