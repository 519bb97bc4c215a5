"""A classifier of the run's own images, always trained in the same way: its features know what tells these images apart."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from genscale.data.lanes import Data, Sample
from genscale.data.loader import StepLoader
from genscale.rng import torch_generator
from genscale.writing import write_whole

RECIPE: dict[str, Any] = {"version": 1, "channels": [32, 64, 128], "width": 64, "steps": 600, "batch": 128, "lr": 3e-3,
                          "weight_decay": 0.01, "sizes": [16, 32, 64], "seed": 0,
                          "scaled_on": 8}
"""Whatever changes the trained network; its hash is in the name of the file that keeps the network."""
GROUPS = 8


class Classifier(nn.Module):
    """Three strided convolutions, a layer of `width` features, and the classes.

    Args:
        classes: number of classes.
    """

    name = "classifier"
    width = RECIPE["width"]

    def __init__(self, classes: int) -> None:
        super().__init__()
        sizes = [3, *RECIPE["channels"]]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, channels) for channels in sizes[1:])
        self.features = nn.Linear(sizes[-1] * 16, self.width)
        self.head = nn.Linear(self.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features fp32 `(batch, width)` of images fp32 `(batch, 1 or 3, size, size)` in [0, 1]."""
        hidden = (2 * images - 1).expand(-1, 3, -1, -1)
        size = next((size for size in RECIPE["sizes"] if images.shape[-1] <= size), RECIPE["sizes"][-1])
        if images.shape[-1] != size:
            hidden = F.interpolate(hidden, size=(size, size), mode="bilinear", antialias=images.shape[-1] > size)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = F.relu(norm(convolution(hidden)))
        return F.relu(self.features(F.adaptive_avg_pool2d(hidden, 4).flatten(1)))

    def identity(self) -> str:
        """SHA-256 of the weights."""
        hashed = hashlib.sha256()
        for name, values in sorted(self.state_dict().items()):
            hashed.update(name.encode() + values.cpu().numpy().astype("<f4").tobytes())
        return hashed.hexdigest()

    @torch.no_grad()
    def accuracy(self, samples: list[Sample]) -> float:
        """Share of samples with a label whose class is found."""
        device, right = self.head.weight.device, 0
        for start in range(0, len(samples), RECIPE["batch"]):
            part = samples[start : start + RECIPE["batch"]]
            images = torch.from_numpy(np.stack([sample["image"] for sample in part])).to(device).float() / 255
            labels = torch.tensor([int(sample["label"]) for sample in part], device=device)
            right += (self.head(self(images)).argmax(1) == labels).sum().item()
        return right / len(samples)


def trained_classifier(data: Data, classes: int, folder: Path, device: torch.device) -> Classifier:
    """The classifier of this data, from `folder` where it was trained before, else trained now (a minute on a CPU) and kept.

    Args:
        data: with labels; its plan and the recipe make the file's name.
        classes: number of classes.
    """
    named = json.dumps([data.plan(), RECIPE, classes], sort_keys=True, default=str)
    file = folder / f"classifier-{hashlib.sha256(named.encode()).hexdigest()[:16]}.safetensors"
    network = Classifier(classes)
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):  # none yet, or damaged
        _train(network, data, device)
        _keep(network, file)
    return network.to(device).eval().requires_grad_(False)


def _train(network: Classifier, data: Data, device: torch.device) -> None:
    _initialise(network)
    network.to(device).train()
    steps, batch = RECIPE["steps"], RECIPE["batch"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["lr"], total_steps=steps)
    loader = StepLoader(data, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1, workers=0,
                        prefetch_steps=2)
    try:
        for _ in tqdm(range(steps), desc="training the classifier", unit="step", disable=None, file=sys.stderr, leave=False):
            (samples,) = loader.next_batch()
            images, labels = samples["image"].to(device).float() / 255, samples["label"].to(device)
            loss = F.cross_entropy(network.head(network(images)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        _scale(network, [loader.next_batch()[0]["image"] for _ in range(RECIPE["scaled_on"])], device)
    finally:
        loader.close()


@torch.no_grad()
def _scale(network: Classifier, batches: list[Tensor], device: torch.device) -> None:
    """Give the features a mean square of 1, where a polynomial kernel is of use, and leave the classes as they are."""
    squares = torch.stack([network(images.to(device).float() / 255).square().mean() for images in batches])
    size = squares.mean().sqrt()
    network.features.weight.div_(size)
    network.features.bias.div_(size)
    network.head.weight.mul_(size)


def _initialise(network: Classifier) -> None:
    """He's normal weights from a fixed seed (He et al. 2015); norms stay as they are made."""
    for name, values in network.named_parameters():
        if values.ndim > 1:
            generator = torch_generator(RECIPE["seed"], "classifier", name)
            nn.init.kaiming_normal_(values, nonlinearity="relu", generator=generator)
        elif not name.startswith("norms"):
            nn.init.zeros_(values)


def _keep(network: Classifier, file: Path) -> None:
    content = save({name: values.detach().cpu().contiguous() for name, values in network.state_dict().items()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)  # also where two evaluations run at once
    except OSError as error:
        print(f"warning: the classifier cannot be kept in {file.parent} ({error.strerror}); the next evaluation trains it anew",
              file=sys.stderr)
