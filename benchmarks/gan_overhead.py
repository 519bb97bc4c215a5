"""What a step of a small GAN costs beside a bare loop: the ring of Gaussians and the digits DCGAN as shipped, taking turns.

    python benchmarks/gan_overhead.py --out benchmarks/results/gan-overhead-cpu.json

Ours is what `genscale train` does in a step: loader, addressed draws, augmentation, phases, guards, averages. The bare loop is
what a person writes for these networks alone: torch.randn, the authors' augmentation (DiffAugment-pytorch), fused AdamW, the
same losses and average; its images are in memory, and nobody looks at its gradients. Blocks of steps take turns; a second bare
loop against the first is the control. Wall time, CPU time of the process (with the loader's thread) and of the training thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from genscale.families import FAMILIES
from genscale.models.batch_norm import BatchNorm
from genscale.settings.config import Config
from genscale.settings.parser import load_config
from our_step import OurSteps
from report import ROOT, circumstances, write

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, WARMUP_BLOCKS = 20, 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "training_thread_cpu": time.thread_time}
CONFIGS = {"ring": ("configs/points/ring.yaml", 1200), "digits": ("configs/dcgan/digits.yaml", 300)}


def plain(module: nn.Module) -> nn.Module:
    """The network with torch's own batch normalisation."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            norm = nn.BatchNorm2d(child.weight.numel(), child.eps, child.momentum)
            norm.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, norm)
        else:
            plain(child)
    return module.train()


def translated(x: Tensor, ratio: float = 0.125) -> Tensor:
    """As in DiffAugment_pytorch.py (Zhao et al. 2020)."""
    moves = [torch.randint(-int(n * ratio + 0.5), int(n * ratio + 0.5) + 1, (len(x), 1, 1)) for n in x.shape[2:]]
    batch, *places = torch.meshgrid(*(torch.arange(n) for n in (len(x), *x.shape[2:])), indexing="ij")
    rows, columns = (torch.clamp(at + move + 1, 0, n + 1) for at, move, n in zip(places, moves, x.shape[2:], strict=True))
    return F.pad(x, [1, 1, 1, 1]).permute(0, 2, 3, 1).contiguous()[batch, rows, columns].permute(0, 3, 1, 2)


def updates(networks: list[nn.Module], config: Config) -> tuple[list[torch.optim.Optimizer], Callable[[], None]]:
    """Optimizers, and what moves the average of the first network."""
    settings = config.optimizer
    optimizers = [torch.optim.AdamW(network.parameters(), lr=settings.lr, betas=settings.betas, eps=settings.eps,
                                    weight_decay=0, fused=True) for network in networks]
    weights = [tensor for tensor in networks[0].state_dict().values() if tensor.is_floating_point()]
    averages = [tensor.clone() for tensor in weights]
    decay = 0.5 ** (config.train.global_batch_size / config.train.ema_half_life)
    return optimizers, lambda: torch._foreach_lerp_(averages, weights, 1 - decay)


def made(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def ring_step(generator: nn.Module, discriminator: nn.Module, config: Config) -> Callable[[], object]:
    (of_g, of_d), average = updates([generator, discriminator], config)
    settings, batch, steps = config.objective, config.train.global_batch_size, iter(range(1, 10**9))
    angles = 2 * torch.pi * torch.arange(8) / 8
    centers = torch.stack([angles.cos(), angles.sin()], 1)

    def fakes() -> Tensor:
        return generator(torch.randn(batch, config.model.latent))

    def penalty(points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
        return 0.5 * slopes.square().sum() / batch

    def step() -> object:
        reals = centers[torch.randint(8, (batch,))] + 0.01 * torch.randn(batch, 2)
        with torch.no_grad():
            fake = fakes()
        real, fake = discriminator(torch.cat([reals, fake])).chunk(2)
        losses = [made(of_d, F.softplus(fake - real).mean())]
        discriminator.requires_grad_(False)
        with torch.no_grad():
            real = discriminator(reals)
        losses.append(made(of_g, F.softplus(real - discriminator(fakes())).mean()))
        discriminator.requires_grad_(True)
        if next(steps) % settings.regularise_every == 0:
            with torch.no_grad():
                fake = fakes()
            made(of_d, settings.regularise_every * (settings.r1 * penalty(reals) + settings.r2 * penalty(fake)))
        average()
        return [loss.item() for loss in losses]

    return step


def digits_step(generator: nn.Module, discriminator: nn.Module, config: Config, samples: list[dict[str, np.ndarray]]) \
        -> Callable[[], object]:
    (of_g, of_d), average = updates([generator, discriminator], config)
    batch = config.train.global_batch_size
    images, labels = (torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in ("image", "label"))
    context = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")

    def step() -> object:
        chosen = torch.randint(len(images), (batch,))
        reals, classes = images[chosen].float() / 127.5 - 1, labels[chosen]
        with context:
            with torch.no_grad():
                fakes = generator(torch.randn(batch, config.model.latent), classes).float()
            real = discriminator(translated(reals), classes).float()
            fake = discriminator(translated(fakes), classes).float()
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        losses = [made(of_d, loss)]
        discriminator.requires_grad_(False)
        with context:
            fakes = generator(torch.randn(batch, config.model.latent), classes).float()
            loss = F.softplus(-discriminator(translated(fakes), classes).float()).mean()
        losses.append(made(of_g, loss))
        discriminator.requires_grad_(True)
        average()
        return [loss.item() for loss in losses]

    return step


def measure(name: str) -> dict[str, Any]:
    source, steps = CONFIGS[name]
    config = load_config(FAMILIES, ROOT / source, [])
    config = replace(config, train=replace(config.train, steps=10**9))  # a constant learning rate, and no end
    ours = OurSteps(config)
    networks = [[plain(copy.deepcopy(ours.objective.networks[each])) for each in ("generator", "discriminator")]
                for _ in range(2)]
    more = [ours.data.validation()] if name == "digits" else []
    bare, control = ((digits_step if more else ring_step)(*pair, config, *more) for pair in networks)
    contestants: dict[str, Callable[[], object]] = {"genscale": ours, "bare": bare, "control": control}
    seconds: dict[str, dict[str, list[float]]] = {clock: {each: [] for each in contestants} for clock in CLOCKS}
    names = list(contestants)
    for turn in range(WARMUP_BLOCKS + steps // BLOCK):
        for each in names[turn % 3 :] + names[: turn % 3]:
            started = {clock: read() for clock, read in CLOCKS.items()}
            for _ in range(BLOCK):
                contestants[each]()
            for clock, read in CLOCKS.items():
                seconds[clock][each].append((read() - started[clock]) / BLOCK)
    ours.close()
    return {"config": source, "steps": steps, "precision": ours.precision,
            **{clock: summary({each: values[WARMUP_BLOCKS:] for each, values in of.items()}) for clock, of in seconds.items()}}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median milliseconds a step; quartiles of the ratios of blocks beside each other."""
    ratios = {f"{name}_over_bare": [round(ratio, 3) for ratio in statistics.quantiles(
        [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)], n=4)] for name in ("genscale", "control")}
    return {**{f"{name}_milliseconds": round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--only", default=",".join(CONFIGS), help=f"which of {', '.join(CONFIGS)}")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {**circumstances(["torch"]), "threads": arguments.threads, "load_before": psutil.getloadavg()}
    result["results"] = {name: measure(name) for name in arguments.only.split(",")}
    write({**result, "load_after": psutil.getloadavg()}, arguments.out)


if __name__ == "__main__":
    main()
