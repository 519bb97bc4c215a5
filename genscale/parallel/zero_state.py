"""Networks and optimizers by parameter name, out of and into the flat partitions that DeepSpeed ZeRO keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from genscale.parallel.engine import Engine, NamedTensors
from genscale.parallel.materialise import named_state
from genscale.parallel.pieces import Piece, pieces_of

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


class PartitionedParameter(nn.Parameter):
    """A parameter with what DeepSpeed sets on it, for the type checker: the first three in stage 3, the last below it."""

    ds_numel: int
    ds_shape: torch.Size
    ds_tensor: Tensor
    _hp_mapping: Any


class ZeroState(Engine):
    """The half of an engine that knows where DeepSpeed has put what.

    Attributes:
        stage: of ZeRO.
    """

    stage: int
    networks: dict[str, DeepSpeedEngine]
    optimizers: dict[str, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3]

    def _held_weights(self, name: str) -> list[Tensor]:
        # Not the partitions themselves: what pads them out is whatever the memory held before, and may be no number.
        return [piece.values for piece in self.cut(name, self.flat_partitions(name))]

    def clear_optimizer_state(self, name: str) -> None:
        self.inner(name).state.clear()

    def network_state(self, name: str) -> NamedTensors:
        from deepspeed.utils import safe_get_full_fp32_param

        if name in self.frozen:
            yield from self._frozen_state(name)
            return
        for key, tensor in named_state(self.modules[name]):
            full = safe_get_full_fp32_param(tensor) if isinstance(tensor, nn.Parameter) else tensor
            yield key, full.detach().cpu()

    def _frozen_state(self, name: str) -> NamedTensors:
        """A network without an optimizer has no weights in fp32 but its own."""
        import deepspeed

        for key, tensor in named_state(self.modules[name]):
            absent = isinstance(tensor, nn.Parameter) and not tensor.numel()
            with deepspeed.zero.GatheredParameters([tensor], enabled=absent):
                full = tensor.detach().clone()
            yield key, (full.float() if full.is_floating_point() else full).cpu()

    def network_pieces(self, name: str) -> list[Piece]:
        buffers = [(key, tensor) for key, tensor in named_state(self.modules[name]) if not isinstance(tensor, nn.Parameter)]
        return [*self.cut(name, self.flat_partitions(name)),
                *pieces_of(buffers, self.processes.rank, self.processes.world_size)]

    def optimizer_pieces(self, name: str) -> list[Piece]:
        flats, inner = self.flat_partitions(name), self.inner(name)
        found: list[Piece] = []
        for kind, value in inner.state.get(flats[0], {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == flats[0].shape:
                found += [replace(piece, name=f"{kind}/{piece.name}")
                          for piece in self.cut(name, [inner.state[flat][kind] for flat in flats])]
            else:  # the step counter: one a flat group, the same in all
                counters = [(f"{kind}/{key}", value.reshape(())) for key, _ in self.modules[name].named_parameters()]
                found += pieces_of(counters, self.processes.rank, self.processes.world_size)
        return found

    def cut(self, name: str, flats: Sequence[Tensor]) -> list[Piece]:
        """The parameters' pieces in flat tensors that are laid out as this rank's partitions."""
        optimizer, parameters = self.optimizers[name], self.modules[name].named_parameters()
        return [self._cut(optimizer, key, cast(PartitionedParameter, parameter), flats) for key, parameter in parameters]

    def _cut(self, optimizer: Any, key: str, parameter: PartitionedParameter, flats: Sequence[Tensor]) -> Piece:
        if self.stage == 3:
            group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            size = parameter.ds_numel
            first = min(length * self.processes.rank, size)
            own = flats[group].detach()[start:start + min(length, size - first)]  # without the padding
            return Piece(key, tuple(parameter.ds_shape), first, own)
        if parameter._hp_mapping is None:  # wholly in the partitions of others
            return Piece(key, tuple(parameter.shape), 0, flats[0].detach()[:0])
        place = parameter._hp_mapping
        start, length = place.hp_fragment_address.start, place.hp_fragment_address.numel
        return Piece(key, tuple(parameter.shape), place.lp_fragment_address.start,
                     flats[place.param_group_index].detach()[start:start + length])

    def load_optimizer_state(self, name: str, keys: Iterable[str], read: Callable[[str], Tensor]) -> None:
        parameters = dict(self.modules[name].named_parameters())
        inner = self.inner(name)
        by_kind: dict[str, list[str]] = {}
        for key in keys:
            kind, parameter_name = key.split("/", 1)
            by_kind.setdefault(kind, []).append(parameter_name)
        for flat in self.flat_partitions(name):
            for kind, names in by_kind.items():
                inner.state[flat][kind] = read(f"{kind}/{names[0]}").clone().to(flat.device) if kind == "step" \
                    else torch.zeros_like(flat)
        self.link_optimizer_state(name)
        for kind, names in by_kind.items():
            if kind == "step":
                continue
            for parameter_name in names:
                self.set_full(parameters[parameter_name], read(f"{kind}/{parameter_name}"), kind)

    def set_full(self, parameter: nn.Parameter, full: Tensor, kind: str | None = None) -> None:
        """Set the fp32 weights of a parameter, or a state of its optimizer, of which this rank keeps its part."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        where, value = () if kind is None else (kind,), full.to(self.processes.device, torch.float32)
        if self.stage < 3:
            (safe_set_full_optimizer_state if kind else safe_set_full_fp32_param)(parameter, value, *where)
            return
        # DeepSpeed's own division forgets the padding of what does not divide by the processes (a single bias).
        part = cast(PartitionedParameter, parameter).ds_tensor.numel()
        mine = value.flatten()[part * self.processes.rank:][:part]
        mine = nn.functional.pad(mine, (0, part - mine.numel()))
        (safe_set_local_optimizer_state if kind else safe_set_local_fp32_param)(parameter, mine, *where)

    def link_optimizer_state(self, name: str) -> None:
        """Point each parameter (stages 1, 2) at its part of the flat optimizer tensors.

        DeepSpeed does so once, right after the first GROUP took its first step, when the other groups have no state yet.
        """
        optimizer = self.optimizers[name]
        if hasattr(optimizer, "_hp_optimizer_states_linked") and self.inner(name).state:
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def inner(self, name: str) -> torch.optim.Optimizer:
        """The torch optimizer that DeepSpeed's wraps; its parameters are this rank's flat partitions."""
        return self.optimizers[name].optimizer

    def flat_partitions(self, name: str) -> list[Tensor]:
        return list(getattr(self.optimizers[name], self.flat_attribute(name)))

    def flat_attribute(self, name: str) -> str:
        optimizer = self.optimizers[name]
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(optimizer, attribute):
                return attribute
        raise RuntimeError(f"unknown DeepSpeed optimizer {type(optimizer).__name__}")
