"""The network and its codebook, the objective, and the functions of the family."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.lanes import Sample
from genscale.errors import UserError
from genscale.models.image_grid import grid_of_rows
from genscale.models.image_layers import to_unit
from genscale.models.initial_weights import InitialWeights
from genscale.models.moving_state import MovingState
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.rng import Draws
from genscale.settings.config import Config
from vq_vae import VQVAESettings

SHRINK = 4
"""Pixels of an image on the side of a code."""
IDLE = 0.1
"""Vectors an update (a moving average) below which a row of the codebook has nothing to do."""


class Codebook(MovingState):
    """Rows that follow the mean of the vectors they are nearest to (van den Oord et al. 2017, appendix A.1)."""

    moving = {"codes": "averaged", "uses": "averaged", "totals": "averaged"}

    def __init__(self, count: int, width: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.empty(count, width))
        self.register_buffer("uses", torch.empty(count))
        self.register_buffer("totals", torch.empty(count, width))

    def reset_parameters(self) -> None:
        self.codes.normal_()
        self.uses.fill_(1.0)
        self.totals.copy_(self.codes)

    def begin_update(self) -> None:
        self.sums = self.totals.new_zeros(len(self.codes), self.codes.shape[1] + 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """The numbers of the nearest rows, int64 `(n,)`, of fp32 vectors `(n, width)`."""
        with torch.autocast(vectors.device.type, enabled=False):  # sums in bf16 would lose most of what is added
            chosen = torch.cdist(vectors, self.codes).argmin(1)
            if self.moves:
                one_hot = F.one_hot(chosen, len(self.codes)).float()
                self.sums += one_hot.T @ F.pad(vectors.detach(), (0, 1), value=1.0)
        return chosen

    def end_update(self) -> None:
        sums = self.sum_over_processes(self.sums)
        self.totals.lerp_(sums[:, :-1], 1 - self.decay)
        self.uses.lerp_(sums[:, -1], 1 - self.decay)
        idle = (self.uses < IDLE).nonzero()[: len(self.uses) // 2, 0]
        busiest = self.uses.argsort(descending=True, stable=True)[: len(idle)]
        for halved in (self.uses, self.totals):  # an idle row shares the work of a busy one (Linde et al. 1980)
            halved[busiest] /= 2
            halved[idle] = halved[busiest]
        self.totals[idle] *= 1.01
        self.codes.copy_(self.totals / self.uses[:, None])


class VQVAE(nn.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, settings: VQVAESettings, channels: int) -> None:
        super().__init__()
        width, code_width = settings.width, settings.code_width
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, code_width, 1), nn.GroupNorm(1, code_width))
        self.codebook = Codebook(settings.codes, code_width, settings.decay)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_width, width, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(width, width, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, channels, 3, 1, 1))

    def forward(self, images: Tensor | None = None, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What is decoded, the squared distances of vectors from their codes, and the codes' numbers `(batch, height, width)`:
        of images `(batch, channels, size, size)` in [0, 1], or of such numbers."""
        if images is not None:
            vectors = self.encoder(images).float().movedim(1, -1)
            chosen = self.codebook(vectors.flatten(0, 2)).view(vectors.shape[:-1])
        codes = self.codebook.codes[chosen]
        vectors = codes if images is None else vectors
        passed_on = vectors + (codes - vectors).detach()  # the decoder's gradient goes to the encoder as it is
        decoded = self.decoder(passed_on.movedim(-1, 1).to(self.decoder[0].weight.dtype))
        return decoded.float(), (vectors - codes).square().sum(-1), chosen


class VQVAEObjective(Objective):
    """Trains `vqvae` to decode what it encodes. A batch holds `image`, uint8 `(batch, channels, size, size)`."""

    unit = "images"
    loss_unit = "squared error per image"
    higher_is_better = frozenset({"codes_used"})
    averaged = ("vqvae",)

    def __init__(self, config: Config, examples: Callable[[], list[Sample]]) -> None:
        with torch.device("meta"):  # the engine fills the parameters, or its share of them, from `initial_weights`
            network = VQVAE(config.model, config.data.channels)
        self.networks = {"vqvae": network}
        self.config, self.examples = config, examples
        self.phases = [Phase("vqvae", "vqvae", self.loss, self.count)]
        self._weights = InitialWeights(network, config.run.seed)

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        return self._weights

    def count(self, batch: Batch) -> int:
        return len(batch["image"])

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        images = to_unit(batch["image"])
        decoded, distance, _ = networks["vqvae"](images)
        return {"reconstruction": (decoded - images).square().sum(),
                "commitment": self.config.objective.commitment * distance.sum()}

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        images = to_unit(batch["image"])
        decoded, _, chosen = networks["vqvae"](images)
        return {"error": (decoded - images).square().flatten(1).sum(1), "codes": chosen.flatten(1).float()}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": totals["error"].mean().item(), "codes_used": len(totals["codes"].unique())}

    @torch.no_grad()
    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """Validation images, above what is decoded of them and of random codes."""
        images = to_unit(torch.from_numpy(np.stack([each["image"] for each in self.examples()[:8]])).to(device))
        side, codes = self.config.data.size // SHRINK, self.config.model.codes
        chances = Draws(seed, "preview", 0, torch.arange(len(images)), device).uniform("codes", side, side)
        return grid_of_rows({"input": images, "output": networks["vqvae"](images)[0],
                             "random": networks["vqvae"](chosen=(chances * codes).long())[0]})


def build_data(settings: ImageDataSettings, seed: int) -> ImageData:
    return ImageData(settings, seed)


def validation(settings: ImageDataSettings, seed: int) -> list[Sample]:
    return ImageData(settings, seed, for_training=False).validation()


def build(config: Config, data: ImageData) -> VQVAEObjective:
    if config.data.size % SHRINK:
        raise UserError(f"data.size: {config.data.size} is no multiple of {SHRINK}; nearest allowed: "
                        f"{max(1, round(config.data.size / SHRINK)) * SHRINK}")
    return VQVAEObjective(config, data.validation)


def restore(config: Config, folder: Path) -> VQVAEObjective:
    return VQVAEObjective(config, lambda: validation(config.data, config.run.seed))
