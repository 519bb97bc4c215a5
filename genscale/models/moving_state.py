"""Layers whose buffers move while they are trained: running statistics, a codebook's moving average, singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

InAverage = Literal["averaged", "copied"]
"""What the moving average of a network's weights does with a buffer: averages it too, or takes it over as it is (the mean of
two unit vectors is none)."""


class MovingState(nn.Module):
    """Base of a layer whose forward changes persistent buffers of its own, so that they are the same on every process, in every
    division of the batch, and after a resume. A layer that changes buffers without saying so is refused.

    A state that moves once an update, from the whole batch, adds up in `forward` (where `moves`) and moves in `end_update`:

        >>> import torch
        >>> class MeanOfInputs(MovingState):
        ...     moving = {"mean": "averaged"}
        ...
        ...     def __init__(self, width: int) -> None:
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(width))
        ...
        ...     def reset_parameters(self) -> None:  # before the first step
        ...         self.mean.zero_()
        ...
        ...     def begin_update(self) -> None:
        ...         self.sums = torch.zeros(len(self.mean) + 1, device=self.mean.device)
        ...
        ...     def forward(self, x: Tensor) -> Tensor:  # (batch, width)
        ...         if self.moves:
        ...             self.sums += torch.cat([x.detach().sum(0), x.new_full((1,), len(x))])
        ...         return x - self.mean
        ...
        ...     def end_update(self) -> None:
        ...         sums = self.sum_over_processes(self.sums)
        ...         self.mean.lerp_(sums[:-1] / sums[-1], 0.1)
        >>> layer = MeanOfInputs(2)
        >>> layer.begin_update()
        >>> _ = layer(torch.ones(4, 2)), layer(torch.ones(4, 2))
        >>> layer.end_update()
        >>> layer.mean
        tensor([0.1000, 0.1000])

    Where sums are matrix products, they belong into `with torch.autocast(x.device.type, enabled=False):`, and are made of
    `x.float()`: forwards may run in bf16.

    Buffers must be changed in place (`copy_`, `lerp_`, `add_`): others hold them too. What is added up belongs into plain
    attributes, not into buffers, and is set anew in `begin_update`: an update may be broken off, or rehearsed.

    Attributes:
        moving: the names of the buffers that move, and what the weights' moving average does with each. The layer's other
            buffers are constants.
        counts_forwards: a second forward of the same batch, made in backward to save memory, would move the state again unless
            the layer looks at `moves`. False for a layer that does not care, which `torch.compile` can then take in.
        all_sum: adds a tensor up over all processes; None where there is one. Set by the engine.
        is_trained: whether the network is the one that is being trained now. Set by the engine.
        may_be_recomputed: whether backward may make a second forward of a batch. Set by the engine.
        is_recomputed: whether the forward under way is the second one of its batch, made in backward. Set by the engine.
    """

    moving: ClassVar[Mapping[str, InAverage]] = {}
    counts_forwards: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.all_sum: Callable[[Tensor], Tensor] | None = None
        self.is_trained, self.may_be_recomputed, self.is_recomputed = True, False, False

    @property
    def moves(self) -> bool:
        """Whether this forward is one that the state follows: in training, of the network that is being trained, and not made
        a second time in backward."""
        return self.training and self.is_trained and not self.is_recomputed

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on every process. Collective: all must ask for the same sums in the same order."""
        return tensor if self.all_sum is None else self.all_sum(tensor)

    def begin_update(self) -> None:
        """An update of the network is about to be made; its forwards follow, one for each micro-batch or more."""

    def end_update(self) -> None:
        """All forwards and backwards of the update are done. Runs without gradients, on every process alike, before the
        optimizer steps; where the update is then left out, the buffers are put back."""


def moving_layers(network: nn.Module) -> list[MovingState]:
    """The network's layers with moving state."""
    return [layer for layer in network.modules() if isinstance(layer, MovingState)]


def moving_buffers(network: nn.Module) -> Iterator[tuple[Tensor, InAverage]]:
    """Every buffer that a layer declares to move, and what the weights' average does with it.

    Raises:
        AttributeError: a layer declares a buffer that it has not.
    """
    for layer in moving_layers(network):
        for name, rule in layer.moving.items():
            yield layer.get_buffer(name), rule
