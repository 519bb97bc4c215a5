"""What a network or a layer may say of its parts, besides being a module."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasBlocks(Protocol):
    """A network of repeated parts."""

    def blocks(self) -> list[nn.Module]:
        """The repeated parts in their order, which are sharded, compiled and recomputed one at a time."""


@runtime_checkable
class HasFusedRows(Protocol):
    """A layer in whose parameters several matrices stand on top of each other."""

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The numbers of rows of each, by parameter: optimizers that treat a matrix as a whole treat each by itself."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, which are compiled, checkpointed and sharded one at a time: its `blocks()`,
    if it has them."""
    if isinstance(module, HasBlocks) and not isinstance(module.blocks, nn.Module):  # nor a list that happens to be named so
        return list(module.blocks())
    return []
