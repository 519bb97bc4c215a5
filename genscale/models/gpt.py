"""The decoder-only transformer of GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from genscale.errors import UserError


@dataclass
class GPTSettings:
    """The `model` section of a GPT."""

    family: Literal["gpt"] = "gpt"
    """Kind of model."""
    layers: PositiveInt = 6
    """Transformer blocks."""
    heads: PositiveInt = 6
    """Attention heads; must divide the width."""
    width: PositiveInt = 384
    """Features of a token between blocks."""
    positions: PositiveInt = 1024
    """Longest sequence the model can read, in tokens."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding table (default: the tokenizer's vocabulary, rounded up to a multiple of 64)."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Added to the variance in layer normalisation."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections onto the residual stream get init_std / sqrt(2 x layers)."""


def check_settings(settings: GPTSettings) -> None:
    """Raise UserError for settings that no GPT can have."""
    width, heads = settings.width, settings.heads
    if width % heads:
        below = width // heads * heads
        widths = " or ".join(str(w) for w in (below, below + heads) if w > 0)
        divisors = [h for h in range(1, width + 1) if width % h == 0]
        near = sorted(sorted(divisors, key=lambda h: abs(h - heads))[:2])
        raise UserError(f"model.heads: {heads} does not divide model.width {width}; nearest allowed: model.heads "
                        f"{' or '.join(map(str, near))}, or model.width {widths}")


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017): `(batch, time, width)` to the same."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.head_width = settings.width // settings.heads
        self.query_key_value = nn.Linear(settings.width, 3 * settings.width)
        self.output = nn.Linear(settings.width, settings.width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        # (batch, time, 3 * heads, head width) -> three of (batch, heads, time, head width)
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around GELU (tanh form): `(batch, time, width)` to the same."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.up = nn.Linear(settings.width, 4 * settings.width)
        self.down = nn.Linear(4 * settings.width, settings.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream: `(batch, time, width)` to the same."""

    def __init__(self, settings: GPTSettings) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.width, settings.layer_norm_eps)
        self.attention = Attention(settings)
        self.mlp_norm = nn.LayerNorm(settings.width, settings.layer_norm_eps)
        self.mlp = MLP(settings)

    def forward(self, x: Tensor) -> Tensor:
        """One step of the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-LayerNorm blocks, and an output layer that shares the token embedding's weights.

    Args:
        settings: the shape.
        vocab_size: rows of the embedding table, hence the width of the logits (`settings.vocab_size` may leave it open).

    Raises:
        UserError: settings that no GPT can have.
    """

    def __init__(self, settings: GPTSettings, vocab_size: int) -> None:
        super().__init__()
        check_settings(settings)
        self.settings = settings
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, settings.width)
        self.position_embedding = nn.Embedding(settings.positions, settings.width)
        self.layers = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.final_norm = nn.LayerNorm(settings.width, settings.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits `(batch, time, vocab_size)` for tokens `(batch, time)` int64, time at most `settings.positions`."""
        time = tokens.shape[1]
        if time > self.settings.positions:
            raise ValueError(f"{time} tokens do not fit into {self.settings.positions} positions")
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(time, device=tokens.device))
        for block in self.layers:
            x = block(x)
        # The tied weight is used by name rather than held by a second module, so that it stands once in a state dict.
        return F.linear(self.final_norm(x), self.token_embedding.weight)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, tensor in and tensor out, which are sharded, compiled and recomputed one at a time."""
        return list(self.layers)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw GPT-2's initial weights, all from `generator` in the order of the modules.

        Matrices and embeddings are normal with `init_std`, biases zero, norms one. Projections onto the residual stream are
        scaled by 1 / sqrt(2 x layers), the number of terms the stream adds up (Radford et al. 2019, section 2.3).
        """
        std = self.settings.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, std, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for block in self.layers:
            for projection in (block.attention.output, block.mlp.down):
                projection.weight.mul_(1 / math.sqrt(2 * self.settings.layers))

    def parameter_count(self) -> int:
        """Trained numbers in all, the tied embedding counted once. Ask before ZeRO-3 takes the parameters apart."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, time: int) -> int:
        """Floating-point operations of forward and backward for one token of a sequence of `time` tokens.

        6 N + 12 layers width time: a multiply and an add for each of the N weights of matrix products (the output layer is
        one, the embedding look-ups are not), once forward and twice backward; and the two products of attention, counted
        over the full square as is the custom (Chowdhery et al. 2022, PaLM, appendix B), though causal kernels skip half.
        """
        weights = sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))
        weights += self.vocab_size * self.settings.width
        return 6 * weights + 12 * self.settings.layers * self.settings.width * time
