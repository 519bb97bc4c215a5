"""Which tokens see which: as a tensor of bools, or by blocks of positions for FlexAttention."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Positions of a block's side, as torch's kernels have it unless told otherwise."""
LEAST_HEAD_WIDTH = 16
"""Width of a head that torch's kernels take, at the least."""


def attention_mask(time: int, seen: int, window: int | None, documents: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys the last `time` of `seen` tokens see, `(batch or 1, 1, time, seen)`; None where plain causal attention does.

    Args:
        window: tokens seen at most, itself included.
        documents: `(batch, seen)`; a token sees its own document alone.
    """
    plain = documents is None and (window is None or window >= seen)
    if plain and (time == seen or time == 1):
        return None
    key = torch.arange(seen, device=device)
    query = key[seen - time:, None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    mask = mask[None, None]
    if documents is not None:
        mask = mask & (documents[:, None, seen - time:, None] == documents[:, None, None, :])
    return mask


class MaskInBlocks:
    """The mask of a whole sequence for FlexAttention (Dong et al. 2024): a block of pairs none of which is seen is left out,
    one all of which are is computed without a mask, and nothing of `(time, time)` is made.

    Args:
        time: tokens of the sequence.
        window, documents: as of `attention_mask`.
    """

    def __init__(self, time: int, window: int | None, documents: Tensor | None, device: torch.device) -> None:
        self.blocks = _block_mask(time, window, documents, device)
        self._dense = partial(attention_mask, time, time, window, documents, device)

    @cached_property
    def dense(self) -> Tensor | None:
        """The same as `attention_mask` gives it, made when it is first asked for: FlexAttention is a kernel only where it is
        compiled, and a network whose blocks are compiled may be run as it is written."""
        return self._dense()


def _block_mask(time: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """Made of the first and last position and of the least and greatest document of each block, which costs `(time / 128)^2`;
    nothing is read from the device, and no shape depends on values."""
    count = -(-time // BLOCK)
    first = torch.arange(count, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=time - 1)
    query_first, query_last, whole = first[:, None], last[:, None], last - first == BLOCK - 1
    some, every = first <= query_last, (last <= query_first) & whole & whole[:, None]
    if window is not None:
        some, every = some & (last > query_first - window), every & (first > query_last - window)
    some, every = some[None], every[None]
    if documents is not None:
        places = torch.arange(count * BLOCK, device=device).clamp(max=time - 1)
        least, greatest = documents[:, places].unflatten(1, (count, BLOCK)).aminmax(dim=-1)
        query_least, query_greatest, least, greatest = least[..., None], greatest[..., None], least[:, None], greatest[:, None]
        some = some & (least <= query_greatest) & (query_least <= greatest)  # they may share one, if these lie between
        every = every & (least == query_greatest) & (query_least == greatest)  # then all four are the same

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key <= query
        if window is not None:
            seen = seen & (key > query - window)
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        return seen

    partly = some & ~every
    return BlockMask((time, time), *_ordered(partly), *_ordered(every), *_ordered(partly.mT), *_ordered(every.mT),
                     BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks `(batch, rows, columns)` as FlexAttention reads them, with a dimension for the heads: how many there are in each
    row, and their columns, these first."""
    there = blocks[:, None].to(torch.int32, memory_format=torch.contiguous_format)
    return there.sum(-1, dtype=torch.int32), there.argsort(dim=-1, descending=True, stable=True).int()
