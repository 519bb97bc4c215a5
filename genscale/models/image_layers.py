"""Layers that the image networks share: normalisation, spectral norm, activations, and initial weights by address."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genscale.models.batch_norm import BatchNorm
from genscale.models.initial_draw import HasInitialScale, InitialScale, OwnDraw, before_parametrization, has_own_draw
from genscale.models.moving_state import MovingState
from genscale.models.norms import Norm
from genscale.rng import torch_generator

SLOPE = 0.2
"""Slope of LeakyReLU below zero."""
GROUPS, GROUP_CHANNELS = 32, 16
"""Groups of a GroupNorm at most, and channels of a group at least (both of Wu and He 2018). In bf16 and channels-last PyTorch's
CPU kernels take 15 to 40 times as long for groups of 8."""
POWER_ITERATIONS = 15
"""Before the first step, so that the first spectral norm is one."""
LINEAR_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def to_signed(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [-1, 1]; what is floating-point already stays as it is."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def to_unit(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [0, 1]; what is floating-point already stays as it is."""
    return images if images.is_floating_point() else images.float() / 255


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """Normalisation over `(batch, channels, ...)`."""
    if kind == "batch":
        return BatchNorm(channels)
    if kind == "group":
        most = min(GROUPS, max(channels // GROUP_CHANNELS, 1))
        return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)
    return nn.Identity()


class SpectralNorm(MovingState):
    """Divides a weight by its largest singular value (Miyato et al. 2018), as a parametrisation of it.

    One power iteration an update, in the first training forward after `begin_update`, not one a forward: second forwards,
    accumulation and recomputation see the same vectors, so that the update does not depend on how it was divided.
    """

    moving = {"u": "copied", "v": "copied"}  # of the weights as they are now: the mean of two unit vectors is none
    u: Tensor
    v: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("u", torch.empty(rows))
        self.register_buffer("v", torch.empty(columns))
        self._due = False

    def begin_update(self) -> None:
        self._due = True

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1).float()
            if self.training and self._due:
                self._due = False
                u, v = power_iteration(matrix.detach(), self.u, 1)
                self.u.copy_(u)
                self.v.copy_(v)
            largest = torch.dot(self.u, matrix @ self.v)
            return weight / largest.to(weight.dtype)


@torch.no_grad()
def power_iteration(matrix: Tensor, u: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Left and right singular vectors `(rows,)`, `(columns,)` of the largest singular value, `count` iterations nearer."""
    for _ in range(count):
        v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
        u = F.normalize(matrix @ v, dim=0, eps=1e-12)
    return u, v


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Put the layer's weight (output first) under `SpectralNorm`."""
    weight = layer.get_parameter("weight")
    rows = weight.shape[0]
    parametrize.register_parametrization(layer, "weight", SpectralNorm(rows, weight.numel() // rows), unsafe=True)
    return layer


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
