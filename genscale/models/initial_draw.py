"""How a layer says what its weights are before the first step.

A layer that `InitialWeights` does not know is drawn by its own method `reset_parameters`, as torch's layers have it: it sets
the layer's own parameters and buffers in place, from torch's random numbers, which are those of (seed, name of the layer) then.

    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.empty(64, 8))

        def reset_parameters(self) -> None:
            nn.init.normal_(self.codes, std=0.1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from genscale.errors import UserError
from genscale.rng import torch_generator

Layer = TypeVar("Layer", bound=nn.Module)


@dataclass(frozen=True)
class InitialScale:
    """How the usual draw of a convolution or a linear layer is changed.

    Attributes:
        gain: factor of the weights' deviation; with 0 they begin as zeros.
        bias: deviation of the biases.
    """

    gain: float = 1.0
    bias: float = 0.0


@runtime_checkable
class HasInitialScale(Protocol):
    """A layer whose usual draw is scaled."""

    initial_scale: InitialScale


def scale_initial(layer: Layer, **scale: float) -> Layer:
    """Give a layer an `InitialScale`, or change the one it has: `scale_initial(nn.Linear(8, 8), gain=0.0)`."""
    own = layer.initial_scale if isinstance(layer, HasInitialScale) else InitialScale()
    layer.initial_scale = replace(own, **scale)  # type: ignore[assignment]
    return layer


@runtime_checkable
class ResetsParameters(Protocol):
    """A layer that draws its own parameters and buffers (not those of the layers inside it)."""

    def reset_parameters(self) -> None:
        """Set them in place, or anew, all of them."""


def has_own_draw(layer: nn.Module, known: Sequence[type]) -> bool:
    """Whether a layer, one of the `known` classes or of a class derived from it, has another `reset_parameters` than these."""
    kind: Any = parametrize.type_before_parametrizations(layer)
    return all(kind.reset_parameters is not each.reset_parameters for each in known)  # type: ignore[attr-defined]


def before_parametrization(path: str, kind: str) -> tuple[str, str]:
    """(layer, tensor) of "<layer>.parametrizations.<tensor>", "original"; of any other address, the address."""
    layer, found, tensor = f".{path}".partition(".parametrizations.")
    return (layer[1:], tensor) if found and kind == "original" else (path, kind)


class OwnDraw:
    """One tensor of a layer, as the layer's `reset_parameters` sets it. Of the layer no more than the shapes is kept.

    Args:
        path: of the layer in the network.
        kind: name of the tensor in the layer.
    """

    def __init__(self, layer: nn.Module, path: str, kind: str) -> None:
        self.path, self.kind = path, kind
        self.layer = _shapes_of(layer)
        self.own = {**self.layer._parameters, **self.layer._buffers}

    def __call__(self, seed: int) -> Tensor:
        """The tensor in full, on the CPU.

        Raises:
            UserError: the layer has no such method, or the method leaves a number of the tensor unset.
        """
        layer = _shapes_of(self.layer)
        if self.kind not in self.own or not isinstance(self.layer, ResetsParameters | nn.MultiheadAttention):
            raise UserError(f"{self._words()}: nobody knows its initial value; {self._way_out()}")
        for tensors in (layer._parameters, layer._buffers):
            tensors.update({name: _unset(tensor) for name, tensor in tensors.items() if tensor is not None})
        address = torch_generator(seed, "weights", self.path).initial_seed()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(address)
            layer.reset_parameters() if isinstance(layer, ResetsParameters) else layer._reset_parameters()
        value = {**layer._parameters, **layer._buffers}[self.kind].detach()
        if value.shape != self.own[self.kind].shape or bool(_is_unset(value).any()):
            raise UserError(f"{self._words()}: reset_parameters leaves it without a value; {self._way_out()}")
        return value.float() if value.is_floating_point() else value

    def _words(self) -> str:
        kind = parametrize.type_before_parametrizations(self.layer)
        shape = tuple(self.own[self.kind].shape) if self.kind in self.own else ""
        return f"layer {self.path or 'of the network itself'} ({kind.__name__}), tensor {self.kind} {shape}".rstrip()

    def _way_out(self) -> str:
        if isinstance(self.layer, parametrize.ParametrizationList):
            return "such a parametrisation has no draw; take the plain layer, or genscale.models.spectral_norm.spectral_norm"
        kind = parametrize.type_before_parametrizations(self.layer)
        return (f"give {kind.__name__} a method reset_parameters(self) that sets its own parameters and buffers in place, as "
                f"torch's layers have it (nn.init.normal_(self.{self.kind}))")


def _shapes_of(layer: nn.Module) -> Any:
    """The layer and what is inside it without memory for any tensor, and without its parametrizations."""
    shapes: Any = object.__new__(parametrize.type_before_parametrizations(layer))
    shapes.__dict__.update(layer.__dict__)
    inside = dict(layer._modules)
    parametrized = inside.pop("parametrizations", None) if parametrize.is_parametrized(layer) else None
    parameters = {name: None if tensor is None else _on_meta(tensor) for name, tensor in layer._parameters.items()}
    if parametrized is not None:
        parameters |= {name: _on_meta(cast(Tensor, each.original)) for name, each in cast(nn.ModuleDict, parametrized).items()
                       if hasattr(each, "original")}
    shapes.__dict__["_parameters"] = parameters
    shapes.__dict__["_buffers"] = {name: tensor if tensor is None else tensor.detach().to("meta")
                                   for name, tensor in layer._buffers.items()}
    shapes.__dict__["_modules"] = {name: None if part is None else _shapes_of(part) for name, part in inside.items()}
    return shapes


def _on_meta(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)


def _unset(tensor: Tensor) -> Tensor:
    """Memory that tells whether somebody has set it, where its type has a value to spare."""
    value = float("nan") if tensor.is_floating_point() or tensor.is_complex() else _least(tensor.dtype)
    made = torch.full(tensor.shape, value, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _is_unset(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.isnan()
    return tensor == _least(tensor.dtype) if tensor.dtype.is_signed else torch.zeros((), dtype=torch.bool)


def _least(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).min if dtype.is_signed else 0
