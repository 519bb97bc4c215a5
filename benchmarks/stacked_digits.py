"""Stacked digits, a small form of Stacked MNIST (Metz et al. 2017): the modes that a DCGAN finds, with and without packing.

    python benchmarks/stacked_digits.py --out benchmarks/results/stacked-digits-cpu.json

An image is three of scikit-learn's 8x8 digits, enlarged to 16 pixels, as its colour channels: 1,000 modes. As in PacGAN (Lin et
al. 2018), 26,000 samples are classified channel by channel by a classifier of the digits; counted are the modes that occur, and
the Kullback-Leibler divergence of their frequencies from those of real images that were classified in the same way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.evaluation.classifier import Classifier, trained_classifier
from genscale.families import FAMILIES, family
from genscale.settings.parser import parse_config
from genscale.training.run import train
from genscale.verbs.trained import find_trained, load_weights
from report import circumstances, write

import numpy as np
import torch
from torch import Tensor

CHANNELS, SAMPLES, BATCH = 3, 26_000, 500
SETTINGS = ["--model.family", "dcgan", "--model.latent", "64", "--model.width", "32", "--data.source", "digits",
            "--data.size", "16", "--data.channels", "1", "--data.stack", "3", "--train.clip", "0",
            "--train.ema_half_life", "5000", "--optimizer.lr", "2e-4", "--optimizer.betas", "[0.5, 0.99]",
            "--optimizer.weight_decay", "0", "--schedule.name", "constant", "--tracking.wandb", "disabled"]


def modes_of(images: Tensor, classifier: Classifier) -> np.ndarray:
    """Modes 0 to 999 of images `(batch, 3, size, size)` in [0, 1]: the digit of each channel."""
    digits = classifier.head(classifier(images.flatten(0, 1).unsqueeze(1))).argmax(1).reshape(-1, CHANNELS)
    return (digits @ torch.tensor([100, 10, 1])).numpy()


def frequencies(modes: np.ndarray) -> np.ndarray:
    return np.bincount(modes, minlength=1000) / len(modes)


@torch.no_grad()
def generated_modes(run: Path, classifier: Classifier) -> np.ndarray:
    config, checkpoint = find_trained(str(run))
    objective = family("dcgan").restore(config, run)
    load_weights(objective, checkpoint)
    found = []
    for numbers in torch.arange(SAMPLES).split(BATCH):
        found.append(modes_of(objective.generate(objective.networks, objective.latents("stacked", numbers)), classifier))
    return np.concatenate(found)


@torch.no_grad()
def real_modes(classifier: Classifier) -> np.ndarray:
    """Of as many real images: digits drawn one by one, as the training data lays them over each other."""
    data = ImageData(ImageDataSettings(size=16, channels=1, labels=True), 0)
    lane = data.open_lane(0)
    found = []
    for _ in range(SAMPLES // BATCH):
        digits = np.stack([next(lane)[0]["image"] for _ in range(BATCH * CHANNELS)]).reshape(BATCH, CHANNELS, 16, 16)
        found.append(modes_of(torch.from_numpy(digits).float() / 255, classifier))
    return np.concatenate(found)


def measure(pack: int, steps: int, batch: int, folder: Path, classifier: Classifier, real: np.ndarray) -> dict[str, Any]:
    run = [*SETTINGS, "--data.pack", str(pack), "--train.steps", str(steps), "--train.global_batch_size", str(batch),
           "--run.dir", str(folder), "--run.name", f"pack-{pack}"]
    result = train(parse_config(FAMILIES, run))
    generated = frequencies(generated_modes(result.folder, classifier))
    there = generated > 0
    # Modes that the reals happen not to show in 26,000 draws count as seen once.
    divergence = (generated[there] * np.log(generated[there] / np.maximum(real[there], 1 / SAMPLES))).sum()
    return {"pack": pack, "steps": steps, "batch": batch, "modes": int(there.sum()), "kl_nats": float(divergence)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64, help="images in a batch, whatever the packing")
    parser.add_argument("--packs", default="1,2")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = ImageData(ImageDataSettings(size=16, channels=1, labels=True), 0)
        classifier = trained_classifier(data, 10, folder, torch.device("cpu"))
        real = frequencies(real_modes(classifier))
        result = circumstances(["torch"]) | {"threads": arguments.threads, "samples": SAMPLES, "settings": SETTINGS,
                                             "classifier_accuracy": classifier.accuracy(data.validation()),
                                             "real": {"modes": int((real > 0).sum())}, "runs": []}
        for pack in map(int, arguments.packs.split(",")):
            result["runs"].append(measure(pack, arguments.steps, arguments.batch // pack, folder, classifier, real))
    write(result, arguments.out)


if __name__ == "__main__":
    main()
