"""Our VAE step against a plain PyTorch fp32 loop: same networks, batch and machine, taking turns.

    python benchmarks/vae_cpu.py --out benchmarks/results/vae-cpu.json

Ours is what `genscale train` does in a step: loader, objective with its statistics, clipping, fused AdamW. Theirs is a loop as
one writes it by hand (contiguous fp32 tensors, `binary_cross_entropy_with_logits`, torch.randn, AdamW, `loss.item()`) over
networks written out below, with our initial weights; its images are in memory already. The two alternate step by step, and
their losses must fall alike. Compared: fp32 on both sides, and our default (bf16 where the CPU computes in it) against fp32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from our_step import OurSteps, compare_precisions, compared
from torch import Tensor, nn

from genscale.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.data.images import ImageDataSettings
from genscale.models.vae_settings import VAESettings
from genscale.objectives.vae_losses import VAEObjectiveSettings

SIZE, WIDTH, MULTIPLIERS, LATENTS = 32, 64, (1, 2, 4, 4), 64
LR, BETAS = 5e-4, (0.9, 0.99)
WARMUP_STEPS = 2
LIKENESS = 0.05  # of mean losses: different images and noise, bf16 against fp32


class Residual(nn.Module):
    """Two convolutions beside the identity, then half or double the size."""

    def __init__(self, a: int, b: int, resample: str | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(a // 16, a), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(b // 16, b), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.resample = resample
        if resample:
            self.resampling = nn.Conv2d(b, b, 3, stride=2 if resample == "down" else 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        x = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2)
        return self.resampling(x) if self.resample else x


class PlainVAE(nn.Module):
    """The same network, written by hand; parameters are called as ours are, so that weights can be copied."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH * m for m in MULTIPLIERS]
        smallest = SIZE >> (len(widths) - 1)
        self.start = (widths[-1], smallest, smallest)
        flat = widths[-1] * smallest**2
        ins = [widths[0], *widths[:-1]]
        outs = [widths[-1], *reversed(widths[1:])]
        self.encoder = nn.ModuleDict({
            "stem": nn.Conv2d(1, widths[0], 3, padding=1),
            "layers": nn.ModuleList(Residual(a, b, "down" if i < len(widths) - 1 else None)
                                    for i, (a, b) in enumerate(zip(ins, widths, strict=True))),
            "final_norm": nn.GroupNorm(widths[-1] // 16, widths[-1]), "head": nn.Linear(flat, 2 * LATENTS)})
        self.decoder = nn.ModuleDict({
            "stem": nn.Linear(LATENTS, flat),
            "layers": nn.ModuleList(Residual(a, b, "up" if i < len(widths) - 1 else None)
                                    for i, (a, b) in enumerate(zip(outs, reversed(widths), strict=True))),
            "final_norm": nn.GroupNorm(widths[0] // 16, widths[0]), "head": nn.Conv2d(widths[0], 1, 3, padding=1)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, d = self.encoder, self.decoder
        h = e["stem"](x)
        for layer in e["layers"]:
            h = layer(h)
        mean, log_variance = e["head"](F.silu(e["final_norm"](h)).flatten(1)).chunk(2, dim=1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        h = d["stem"](z).view(-1, *self.start)
        for layer in d["layers"]:
            h = layer(h)
        return d["head"](F.silu(d["final_norm"](h))), mean, log_variance


def plain_step(network: nn.Module) -> Callable[[Tensor], float]:
    """One pass through the body of a training loop; gives the loss in nats an image."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        logits, mean, log_variance = network(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        loss = (reconstruction + kl) / len(x)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def compare(precision: str, batch: int, steps: int) -> dict[str, Any]:
    config = Config(model=VAESettings(width=WIDTH, multipliers=list(MULTIPLIERS), latents=LATENTS, likelihood="bernoulli"),
                    objective=VAEObjectiveSettings(), data=ImageDataSettings(size=SIZE, channels=1),
                    train=TrainSettings(steps=10**6, global_batch_size=batch, precision=precision, clip=1.0),
                    optimizer=OptimizerSettings(lr=LR, betas=BETAS, weight_decay=0.0),
                    schedule=ScheduleSettings(name="constant"))
    ours, plain = OurSteps(config), PlainVAE()
    read = ours.objective.initial_weights("vae")
    plain.load_state_dict({name: read(name) for name in plain.state_dict()})
    parameters = sum(p.numel() for p in plain.parameters())
    if parameters != ours.parameters:
        raise SystemExit(f"the networks are not the same: {ours.parameters:,} and {parameters:,} parameters")
    theirs, images = plain_step(plain), _images(ours, (WARMUP_STEPS + steps) * batch)
    seconds: dict[str, list[float]] = {"genscale": [], "plain": []}
    losses: dict[str, list[float]] = {"genscale": [], "plain": []}
    for turn in range(WARMUP_STEPS + steps):
        x = images[turn * batch:(turn + 1) * batch]
        started = time.perf_counter()
        losses["plain"].append(theirs(x))
        seconds["plain"].append(time.perf_counter() - started)
        report = ours()
        losses["genscale"].append(report.metrics["loss"])
        seconds["genscale"].append(report.seconds)
    ours.close()
    means = {name: statistics.mean(values) for name, values in losses.items()}
    difference = abs(means["genscale"] - means["plain"]) / means["plain"]
    if difference > LIKENESS:
        raise SystemExit(f"the two do not train alike: their mean losses differ by {difference:.1%}")
    return {"parameters": parameters, "batch": batch, "steps": steps,
            "precision": {"genscale": ours.precision, "plain": "fp32"},
            "relative_difference_of_mean_losses": difference, **compared(seconds, WARMUP_STEPS)}


def _images(ours: OurSteps, count: int) -> Tensor:
    """fp32 images in [0, 1], as a plain loop would hold them."""
    samples = [torch.from_numpy(sample["image"]) for sample in ours.data.validation()]
    return torch.stack([samples[i % len(samples)] for i in range(count)]).float() / 255


if __name__ == "__main__":
    compare_precisions(__doc__.splitlines()[0], compare, batch=64)
