"""The classifier that a reward asks, as a frozen network: the one that `genscale evaluate` knows the run's images by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from genscale.data.images.data import ImageDataSettings
from genscale.evaluation.classifier import Classifier, labelled, trained_classifier


class FrozenClassifier(nn.Module):
    """Logits fp32 `(batch, classes)` of images in [0, 1].

    Args:
        names: of the classes.
        images: that the run was trained on.
        run: its folder, or a checkpoint's; the classifier is kept beside it, or trained anew in a minute.
    """

    def __init__(self, names: list[str], images: ImageDataSettings, run: str) -> None:
        super().__init__()
        self.names, self.images, self.run = names, images, run
        self.classifier = Classifier(len(names))

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"trained on the images of {self.run}"

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.head(self.classifier(images.to(self.classifier.head.weight.dtype))).float()

    def trained(self) -> Callable[[str], Tensor]:
        """Its weights, from the file beside the run where it was trained before. Raises UserError where the images are gone."""
        data = labelled(self.images)
        try:
            network = trained_classifier(data, len(self.names), _beside(Path(self.run)), torch.device("cpu"))
        finally:
            data.close()
        state = network.state_dict()
        return lambda name: state[name.removeprefix("classifier.")]


def _beside(run: Path) -> Path:
    """The folder of classifiers beside a run folder, from it or a folder in it."""
    run = run.expanduser().resolve()
    folder = next((each for each in (run, *run.parents) if (each / "checkpoints").is_dir()), run)
    return folder.parent / "classifiers"
