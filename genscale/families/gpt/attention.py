"""Causal self-attention with its options: grouped queries, rotary positions, normalised queries and keys, masks, a cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from genscale.families.gpt.masks import MaskInBlocks
from genscale.families.gpt.settings import ResolvedGPTSettings
from genscale.models.device_kind import on_gpu
from genscale.models.dropout import dropped
from genscale.models.sequence_part import WHOLE, SequencePart


class KeyValueCache:
    """Keys and values of the tokens read so far, so that the next ones need not compute them again.

    Args:
        layers: blocks of the network.
        capacity: most tokens it will hold.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.documents: Tensor | None = None
        self._held: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer `(batch, kv_heads, time so far, head_width)`, the new ones at their end."""
        held = self._held[layer]
        if held is None:
            room = (*key.shape[:2], self.capacity, key.shape[3])
            held = self._held[layer] = (key.new_empty(room), value.new_empty(room))
        end = self.length + key.shape[2]
        for whole, new in zip(held, (key, value), strict=True):
            whole[:, :, self.length:end] = new
        return held[0][:, :, :end], held[1][:, :, :end]

    def repeat(self, times: int) -> None:
        """Each row so many times, one after the other: they go on from the same tokens."""
        for layer, held in enumerate(self._held):
            if held is not None:
                self._held[layer] = (held[0].repeat_interleave(times, 0), held[1].repeat_interleave(times, 0))
        if self.documents is not None:
            self.documents = self.documents.repeat_interleave(times, 0)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017): `(batch, time, width)` to the same.

    Grouped queries: Ainslie et al. 2023. Normalised queries and keys: Dehghani et al. 2023, section 2.
    """

    def __init__(self, settings: ResolvedGPTSettings, layer: int) -> None:
        super().__init__()
        self.settings, self.layer = settings, layer
        query, shared = settings.heads * settings.head_width, settings.kv_heads * settings.head_width
        self.query_key_value = nn.Linear(settings.width, query + 2 * shared, bias=settings.bias)
        self.output = nn.Linear(query, settings.width, bias=settings.bias)
        if settings.qk_norm:
            self.query_norm = nn.RMSNorm(settings.head_width, settings.norm_eps)
            self.key_norm = nn.RMSNorm(settings.head_width, settings.norm_eps)

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of the matrices that stand on top of each other in one parameter, for optimizers that treat each as a whole."""
        s = self.settings
        shared = s.kv_heads * s.head_width
        return {"query_key_value.weight": (s.heads * s.head_width, shared, shared)}

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | MaskInBlocks | None, dropout_keys: Tensor | None,
                cache: KeyValueCache | None, part: SequencePart = WHOLE) -> Tensor:
        """Mix each position with those it may see.

        Args:
            x: `(batch, time, width)`.
            rotation: of each position, as `rotary_angles` gives it; None without rotary positions.
            mask: `(batch or 1, 1, time, time seen)`, true where a query sees a key; None: itself and all before it. In blocks
                it goes to FlexAttention, where the forward is compiled.
            dropout_keys: `(batch,)` int64, what the dropped attention weights are drawn from; None: none are.
            cache: what was read before.
            part: of the sequence that `x` and `rotation` are, of which there is no cache; the mask is that of all of it.
        """
        s = self.settings
        # (batch, time, heads x head width) -> (batch, heads, time, head width)
        heads = self.query_key_value(x).unflatten(-1, (-1, s.head_width)).transpose(1, 2)
        query, key, value = heads.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        if s.qk_norm:
            if on_gpu(query):  # whose kernel for this takes weights and numbers of one type; else it is ten operations
                query, key = query.to(self.query_norm.weight.dtype), key.to(self.key_norm.weight.dtype)
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            cosine, sine = rotation.view(torch.float32).chunk(2, dim=-1)
            query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        if part.of > 1:
            query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm leaves them in fp32
            copies = math.lcm(s.kv_heads, part.of) // s.kv_heads  # so many that each process has a whole number of them
            query, key, value = part.to_heads(query, _repeated(key, copies), _repeated(value, copies))
        mixed = self._mixed(query, key, value, mask, dropout_keys, part)
        if part.of > 1:
            mixed = part.to_time(mixed)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | MaskInBlocks | None, dropout_keys: Tensor | None,
               part: SequencePart) -> Tensor:
        """What each query `(batch, heads, time, head_width)` takes of the values that it may see, in the same shape."""
        if isinstance(mask, MaskInBlocks):
            if torch.compiler.is_compiling():
                query, key = query.to(value.dtype), key.to(value.dtype)  # as above
                mixed: Tensor = flex_attention(query, key, value, block_mask=mask.blocks, enable_gqa=True)
                return mixed
            mask = mask.dense
        s = self.settings
        dropout = dropout_keys is not None and s.attention_dropout > 0
        # A GPU's kernels share keys and values among queries themselves, but for those that take a mask or fp32.
        shared = query.shape[1] // key.shape[1]
        shares = shared > 1 and on_gpu(key) and mask is None and not dropout and _computes_in_16_bits(key)
        if not shares:
            key, value = _repeated(key, shared), _repeated(value, shared)
        if dropout_keys is not None and dropout:
            return _attention_with_dropout(query, key, value, mask, dropout_keys, 3 * self.layer + 1, s.attention_dropout,
                                           part.index)
        causal = mask is None and query.shape[2] > 1
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=shares)


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each head so many times, one after the other: `(batch, heads, ...)` to `(batch, heads times, ...)`."""
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _computes_in_16_bits(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype).itemsize == 2


def _attention_with_dropout(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_keys: Tensor, stream: int,
                            share: float, index: int) -> Tensor:
    """Attention in the open, `(batch, heads, time, time)` weights and all: fused kernels do not draw dropout by sample."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1)
    return dropped(weights, dropout_keys, stream, share, index).to(value.dtype) @ value


def rotary_angles(positions: Tensor, settings: ResolvedGPTSettings) -> Tensor:
    """Cosines, then sines, of the rotation at each position `(batch or 1, time)`: `(batch or 1, 1, time, head_width)`.

    They are the bits of fp32, held as int32: a sharded block rounds the floating-point numbers that it is given to the
    precision it computes in.

    Su et al. 2021, "RoFormer", equation 15; pair i turns by base^(-2 i / head_width) a position.
    """
    exponents = torch.arange(0, settings.head_width, 2, dtype=torch.float32, device=positions.device) / settings.head_width
    frequencies = 1.0 / settings.rope_base**exponents
    if settings.rope_scaling == "linear":  # Chen et al. 2023, "Extending context window via position interpolation"
        frequencies = frequencies / settings.rope_factor
    elif settings.rope_scaling == "llama3":
        frequencies = _llama3_frequencies(frequencies, settings)
    angles = positions[:, None, :, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).view(torch.int32)


def _llama3_frequencies(frequencies: Tensor, settings: ResolvedGPTSettings) -> Tensor:
    """Llama 3.1's stretching: waves that turn often within the original positions stay, those that hardly turn are stretched,
    those between are blended (Grattafiori et al. 2024; the reference code's apply_scaling)."""
    turns = settings.rope_original_positions * frequencies / (2 * math.pi)
    low, high = settings.rope_low_frequency, settings.rope_high_frequency
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / settings.rope_factor)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys `(batch, heads, time, head_width)` turned; feature i is paired with i + head_width / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def positions_within(documents: Tensor) -> Tensor:
    """Each token's distance from the first token of its document, `(batch, time)` like the document numbers."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    opens = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - index.where(opens, 0).cummax(dim=1).values
