"""Initial weights by address: what a network begins with depends on nothing but seed and name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.models.batch_norm import BatchNorm
from genscale.models.initial_draw import HasInitialScale, InitialScale, OwnDraw, before_parametrization, has_own_draw
from genscale.models.spectral_norm import SpectralNorm, power_iteration
from genscale.rng import torch_generator

POWER_ITERATIONS = 15
"""Before the first step, so that the first spectral norm is one."""
LINEAR_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


@dataclass(frozen=True)
class _Tensor:
    """A tensor whose draw `InitialWeights` makes itself."""

    shape: torch.Size
    owner: str
    kind: str
    scale: float


class InitialWeights:
    """The initial value of every parameter and buffer of a network, a function of seed and name alone: whoever holds a part of
    the network asks for the tensors one at a time, in any order.

    Convolutions of images, linear layers and embeddings are normal, with deviation `std`, or (None) the square root of one over
    the fan-in; where a layer has an `InitialScale`, times its gain, and its biases are normal with the scale's deviation, else
    0. `BatchNorm` is 1 with a deviation of `std`, as in Radford et al. 2015. Every other layer, also one of these kinds with a
    `reset_parameters` of its own, is drawn as that method says (`genscale.models.initial_draw`).

        >>> network = nn.Sequential(nn.Conv1d(2, 8, 3), nn.Linear(8, 8))
        >>> read = InitialWeights(network, seed=1)
        >>> read("0.weight").shape
        torch.Size([8, 2, 3])

    Args:
        network: on any device; its shapes are noted now, and later it may be sharded.
    """

    def __init__(self, network: nn.Module, seed: int, std: float | None = None) -> None:
        self._seed, self._std = seed, std
        modules = dict(network.named_modules(remove_duplicate=False))
        self._tensors: dict[str, _Tensor | OwnDraw] = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            path, kind = name.rpartition(".")[::2]
            layer = modules[path]
            if not isinstance(layer, SpectralNorm):
                path, kind = before_parametrization(path, kind)
                layer = modules[path]
            if (scale := self._scale(layer, kind, tensor.shape)) is None:
                self._tensors[name] = OwnDraw(layer, path, kind)
            else:
                self._tensors[name] = _Tensor(tensor.shape, path, kind, scale)

    def _scale(self, layer: nn.Module, kind: str, shape: torch.Size) -> float | None:
        """The deviation of a tensor that is drawn here; None: the layer draws it."""
        if isinstance(layer, SpectralNorm):
            return 0.0
        if isinstance(layer, BatchNorm):
            return 0.0 if kind == "bias" else self._std or 0.0
        if not isinstance(layer, LINEAR_LAYERS) or kind not in ("weight", "bias") or has_own_draw(layer, LINEAR_LAYERS):
            return None
        scale = layer.initial_scale if isinstance(layer, HasInitialScale) else InitialScale()
        if kind == "bias":
            return scale.bias
        fan_in = 1.0 if isinstance(layer, nn.Embedding) else math.prod(shape[1:])
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in = shape[0] * math.prod(shape[2:]) / math.prod(layer.stride)
        return (fan_in**-0.5 if self._std is None else self._std) * scale.gain

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name in full, on the CPU: fp32, or whole numbers where it holds such.

        Raises:
            UserError: nobody knows how it is drawn; names the layer, the tensor and what to do.
        """
        tensor = self._tensors[name]
        if isinstance(tensor, OwnDraw):
            return tensor(self._seed)
        if tensor.kind in ("u", "v"):
            return self._singular_vector(name, tensor)
        if tensor.kind == "running_mean":
            return torch.zeros(tensor.shape)
        normal = torch.randn(tensor.shape, generator=torch_generator(self._seed, "weights", name)) if tensor.scale else 0.0
        if tensor.kind == "bias" or len(tensor.shape) > 1:
            return normal * tensor.scale + torch.zeros(tensor.shape)
        return torch.ones(tensor.shape) + normal * (0.0 if tensor.kind == "running_var" else tensor.scale)

    def _singular_vector(self, name: str, tensor: _Tensor) -> Tensor:
        weight = self(f"{tensor.owner.rpartition('.')[0]}.original").flatten(1)
        start = torch.randn(len(weight), generator=torch_generator(self._seed, "weights", f"{tensor.owner}.u"))
        return dict(zip("uv", power_iteration(weight, F.normalize(start, dim=0), POWER_ITERATIONS), strict=True))[tensor.kind]
