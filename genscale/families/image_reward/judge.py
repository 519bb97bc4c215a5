"""The reward `classifier` of a policy over pictures: its network is one of the objective's own, frozen."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from genscale.evaluation.classifier import Classifier
from genscale.rewards.base import ImageReward
from genscale.rewards.picture_settings import ClassifiedSettings
from genscale.rewards.pictures import Classified
from genscale.rewards.runs import image_classifier


class FrozenClassifier(nn.Module):
    """Logits fp32 `(batch, classes)` of images in [0, 1].

    Args:
        run: whose images it knows.
        classes: how many they have.
    """

    def __init__(self, run: str, classes: int) -> None:
        super().__init__()
        self.run, self.classifier = run, Classifier(classes)

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"trained on the images of {self.run}"

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.head(self.classifier(images.to(self.classifier.head.weight.dtype))).float()

    def trained(self) -> Callable[[str], Tensor]:
        """Its weights: those kept beside the run, or trained now. Raises UserError where the run or its images are gone."""
        state = image_classifier(self.run)[0].state_dict()
        return lambda name: state[name.removeprefix("classifier.")].cpu()


class HeldClassified(Classified):
    """The reward `classifier`, which asks a network of the objective.

    Args:
        names: of the classes.

    Attributes:
        network: the objective puts it there, as it is spread.

    Raises:
        UserError: the wished class is none of them.
    """

    network: nn.Module

    def __init__(self, asked: ClassifiedSettings, names: list[str]) -> None:
        ImageReward.__init__(self, asked)
        self._choose(names)

    def identity(self) -> None:
        """Its network is one of the objective's."""

    def scores(self, images: Tensor) -> Tensor:
        """Logits of the classes, `(batch, classes)`."""
        logits: Tensor = self.network(images)
        return logits
