"""The contract that lets one loop train everything: an objective holds networks by name and lists the phases of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.models.sequence_part import SequencePart
from genscale.rng import Draws
from genscale.settings.config import Config

if TYPE_CHECKING:
    from genscale.rewards.collection import Rewards

Networks = Mapping[str, nn.Module]
Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Blueprint:
    """What a step can be planned of, without data: made by the function `blueprint(config)` of a family's module.

    Attributes:
        objective: as of a run; its networks stand on the meta device.
        sample: a sample of the data by shape and type: tensors on the meta device, without the batch's dimension. (`sample`,
            the sample's number, is added.)

    Example:
        >>> import torch
        >>> sample = {"image": torch.empty(3, 64, 64, dtype=torch.uint8, device="meta")}
        >>> sample["image"].shape
        torch.Size([3, 64, 64])
    """

    objective: Objective
    sample: Mapping[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One part of a step: trains ONE network on one loss.

    Attributes:
        name: unique in the objective; prefixes the metrics when there are several phases.
        network: name of the network it trains; all others are frozen meanwhile.
        loss: pure function of (networks, micro-batch, draws). Returns named weighted terms, each a scalar in fp32 that is the
            SUM over the micro-batch; the trainer divides by the global count, so that no mean of means arises.
        count: number of units in a micro-batch that the sums run over (valid tokens, or samples).
        repeats: how many times in a step it runs, each on a global batch of its own.
        every: runs only in steps divisible by this (lazy regularisation).
        second_order: takes gradients of gradients (gradient penalties): computed in fp32, on the plain modules.
        statistics: names among the terms that are logged and are no part of the loss.
    """

    name: str
    network: str
    loss: Callable[[Networks, Batch, Draws], Terms]
    count: Callable[[Batch], int]
    repeats: int = 1
    every: int = 1
    second_order: bool = False
    statistics: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rollout:
    """A network to generate with, inside `Objective.generating`.

    Attributes:
        network: the network to call; it may be called as often as this process likes, as long as `goes_on` is asked before each
            call that depends on what was generated.
        goes_on: whether to call the network once more, given whether this process wants to. Where the processes need not wait
            for each other, that is the answer; where they must (`together`), the answer is whether any of them wants to, and a
            process that does not calls the network all the same and drops the result.
        together: every call is collective, because the network did not fit in memory whole.
    """

    network: nn.Module
    goes_on: Callable[[bool], bool] = bool
    together: bool = False


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Inside, there are no gradients, and every layer computes as in evaluation; afterwards as before."""
    training = [layer for layer in network.modules() if layer.training]
    try:
        network.eval()
        with torch.no_grad():
            yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def _generating(network: nn.Module) -> Iterator[Rollout]:
    with in_evaluation(network):
        yield Rollout(network)


class Objective(ABC):
    """What a step minimises. Subclasses hold plain modules; they know nothing of ranks, wrappers or optimizers.

    Attributes:
        unit, units_per_sample: the clock shown beside steps, and how much of it a sample is.
        loss_unit: of `summarise`'s `loss`, for the plot.
        higher_is_better: metrics of `summarise` of which this is true.
        averaged: networks that samples are made with: `train.ema_half_life` averages their weights.
        frozen: networks that no phase trains (a reference policy, a teacher, a tokenizer of images), and where the weights of
            each come from, as text for people. They are spread like the others, always compute as in evaluation, and have no
            gradients, no optimizer and no average. When the run begins, their weights are those that `model.from` names, where
            it names some, else those of `initial_weights`: the run folder then keeps a copy (`frozen/<name>.safetensors`), and
            checkpoints hold its SHA-256. To build the objective again, for a resume or to sample, must not need the place where
            they came from.
        rewards: what judges what a policy has made, `build_rewards` of `genscale.rewards.collection`; a run gives it its folder
            and its watchdog, and closes it. None where nothing is judged.
        couples_samples: a loss depends on which samples share a micro-batch (batch normalisation, packing): the number of
            micro-batches in a step is then part of the run.
    """

    networks: dict[str, nn.Module]
    phases: Sequence[Phase]
    unit: str = "samples"
    units_per_sample: int = 1
    loss_unit: str = "nats per token"
    higher_is_better: frozenset[str] = frozenset()
    averaged: Sequence[str] = ()
    frozen: Mapping[str, str] = {}
    rewards: Rewards | None = None
    couples_samples: bool = False

    @abstractmethod
    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """Reads a network's initial weights: the name of a parameter or persistent buffer to its full value, fp32 on the CPU.
        Networks may stand on the meta device. Each tensor is asked for by one of the processes, which sends it to the others,
        and in any order: its value may depend on seed and name alone."""

    def generating(self, name: str) -> AbstractContextManager[Rollout]:
        """Context in which a network is called many times without gradients, as in evaluation: a rollout. In a run, the network
        is held whole by every process meanwhile, where it fits. To enter it is collective: every process enters alike.

        >>> with self.generating("policy") as rollout:
        ...     while rollout.goes_on(not bool(ended.all())):
        ...         tokens, ended = self.one_more(rollout.network, tokens, ended)
        """
        return _generating(self.networks[name])  # a run puts its engine's here

    def split_sequences(self, part: SequencePart) -> None:
        """From here on each sequence is computed by `part.of` processes, of which this one has `part`: a phase's `loss` and
        `count`, and `evaluate`, are then those of its part. Called once, before the networks are spread.

        Raises:
            UserError: it cannot be; as, of more parts than one, in any family that does not say how.
        """
        if part.of > 1:
            raise UserError(f"parallel.context: {part.of} splits sequences, which the family gpt can, and this one cannot; "
                            "use 1")

    def flops_per_unit(self) -> int | None:
        """Floating-point operations of forward and backward for one unit, or None where that is not known."""
        return None

    @abstractmethod
    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums over one batch of the validation set (fp32 or fp64 scalars), added up over all batches and ranks; and values by
        sample, `(batch, ...)`, which are joined in the order of the samples. The batch holds `sample`, int64 `(batch,)`: the
        samples' numbers in the validation set, to address draws by."""

    @abstractmethod
    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Metrics from the totals of `evaluate`: a float where it gave sums, a fp32 tensor `(samples, ...)` on the CPU where it
        gave values by sample. Must hold `loss`, by which the best checkpoint is chosen (lower is better)."""

    def save_assets(self, folder: Path) -> None:
        """Write what `Family.restore` needs besides weights and config (a tokenizer) to the run folder."""

    def use_assets(self, config: Config, folder: Path) -> Config:
        """The config with the assets of the run folder, for evaluating the trained run on other data."""
        return config

    @abstractmethod
    def preview(self, networks: Networks, seed: int, device: torch.device) -> str | np.ndarray:
        """A small sample to log: text, or a picture, uint8 `(height, width, 3)`. Runs on every rank alike (a sharded forward is
        collective)."""


def check_networks(objective: Objective) -> None:
    """Raises UserError where a network has no phase and is not declared frozen, or a phase or an average names a frozen or an
    unknown one."""
    kind, frozen = type(objective).__name__, objective.frozen
    known = ", ".join(objective.networks)
    for what, names in (("Objective.frozen", frozen), ("Objective.averaged", objective.averaged)):
        for name in names:
            if name not in objective.networks:
                raise UserError(f"{what}: {name} is no network of {kind}; its networks are {known}")
    for phase in objective.phases:
        if phase.network not in objective.networks:
            raise UserError(f"phase {phase.name}: {phase.network} is no network of {kind}; its networks are {known}")
        if phase.network in frozen:
            raise UserError(f"phase {phase.name}: it trains {phase.network}, which Objective.frozen of {kind} declares frozen; "
                            "take it out of one of them")
    for name in objective.averaged:
        if name in frozen:
            raise UserError(f"Objective.averaged: {name} is declared frozen by Objective.frozen of {kind}: its weights never "
                            "move; take it out of one of them")
    trained = {phase.network for phase in objective.phases}
    for name in objective.networks:
        if name not in trained and name not in frozen:
            raise UserError(f"Objective.networks: no phase of {kind} trains {name}; declare it in Objective.frozen, or leave "
                            "it out")
