"""A residual VAE and its training loop as one writes them by hand: contiguous fp32 tensors, `binary_cross_entropy_with_logits`,
torch.randn, AdamW, `loss.item()`, over images that are in memory already.

    python vae_loop.py --batch 64
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from dcgan_tutorial import images
from torch import Tensor, nn

SIZE, WIDTH, MULTIPLIERS, LATENTS = 32, 64, (1, 2, 4, 4), 64
LR, BETAS = 5e-4, (0.9, 0.99)


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
    """Encoder and decoder of residual blocks, written by hand."""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, required=True)
    count = parser.parse_args().batch
    network, pictures = PlainVAE(), images(SIZE, 1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, weight_decay=0.0)
    for step in range(10**6):
        start = step * count % (len(pictures) - count)
        x = pictures[start : start + count]
        optimizer.zero_grad()
        logits, mean, log_variance = network(x)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        loss = (reconstruction + kl) / count
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        value = loss.item()
        if step % 10 == 0:
            print(f"loss {value:.4f}", flush=True)


if __name__ == "__main__":
    main()
