"""The decoder-only transformer: GPT-2 (Radford et al. 2019), Llama and Qwen3 in one class, by settings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.families.gpt.attention import Attention, KeyValueCache, positions_within, rotary_angles
from genscale.families.gpt.masks import BLOCK, LEAST_HEAD_WIDTH, MaskInBlocks, attention_mask
from genscale.families.gpt.settings import GPTSettings, ResolvedGPTSettings, resolved
from genscale.models.cross_entropy import summed_cross_entropy
from genscale.models.device_kind import is_compiled, is_planned, on_gpu
from genscale.models.dropout import dropped
from genscale.models.sequence_part import WHOLE, SequencePart
from genscale.rng import torch_generator

__all__ = ["GPT", "GPTSettings", "KeyValueCache", "resolved"]


class MLP(nn.Module):
    """Widen, bend, narrow: `(batch, time, width)` to the same.

    swiglu: Shazeer 2020, "GLU variants improve transformer"; relu2: So et al. 2021, "Primer".
    """

    def __init__(self, settings: ResolvedGPTSettings) -> None:
        super().__init__()
        self.activation = settings.activation
        self.up = nn.Linear(settings.width, settings.mlp_width, bias=settings.bias)
        if self.activation == "swiglu":
            self.gate = nn.Linear(settings.width, settings.mlp_width, bias=settings.bias)
        self.down = nn.Linear(settings.mlp_width, settings.width, bias=settings.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "relu2":
            return self.down(F.relu(self.up(x)).square())
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def _norm(settings: ResolvedGPTSettings) -> nn.Module:
    if settings.norm == "rmsnorm":  # Zhang and Sennrich 2019
        return nn.RMSNorm(settings.width, settings.norm_eps)
    return nn.LayerNorm(settings.width, settings.norm_eps, bias=settings.bias)


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to the residual stream: `(batch, time, width)` to the same."""

    def __init__(self, settings: ResolvedGPTSettings, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, settings.dropout
        self.attention_norm = _norm(settings)
        self.attention = Attention(settings, layer)
        self.mlp_norm = _norm(settings)
        self.mlp = MLP(settings)

    def forward(self, x: Tensor, rotation: Tensor | None, mask: Tensor | MaskInBlocks | None = None,
                dropout_keys: Tensor | None = None, cache: KeyValueCache | None = None, part: SequencePart = WHOLE) -> Tensor:
        """One step of the residual stream; arguments as of `Attention.forward`."""
        # Without names, which would hold what nobody needs through the MLP.
        x = x + self._dropped(self.attention(self.attention_norm(x), rotation, mask, dropout_keys, cache, part), dropout_keys,
                              2, part)
        return x + self._dropped(self.mlp(self.mlp_norm(x)), dropout_keys, 3, part)

    def _dropped(self, x: Tensor, keys: Tensor | None, place: int, part: SequencePart) -> Tensor:
        if keys is None or not self.dropout:
            return x
        # Streams 3 l + 1 to 3; 0 is the embedding's.
        return dropped(x, keys, 3 * self.layer + place, self.dropout, part.index)


class GPT(nn.Module):
    """A decoder-only language model. It has no buffers, and may be built on the meta device and filled later.

    Args:
        settings: the shape; `GPT.settings` is the same with nothing left open.
        vocab_size: rows of the embedding table, hence the width of the logits (`settings.vocab_size` may leave it open).

    Attributes:
        part: of each sequence that this process computes the loss of; where it is not the whole, every process of its group
            gives the same tokens, and gets the loss of its own part. Logits are of whole sequences in any case.

    Raises:
        UserError: settings that no GPT can have.
    """

    def __init__(self, settings: GPTSettings, vocab_size: int) -> None:
        super().__init__()
        self.settings = whole = resolved(settings)
        self.vocab_size = vocab_size
        self.part = WHOLE
        self.token_embedding = nn.Embedding(vocab_size, whole.width)
        if whole.position_encoding == "learned":
            self.position_embedding = nn.Embedding(whole.positions, whole.width)
        self.layers = nn.ModuleList(Block(whole, layer) for layer in range(whole.layers))
        self.final_norm = _norm(whole)
        if not whole.tied:
            self.output = nn.Linear(whole.width, vocab_size, bias=False)
        # Noted now: ZeRO-3 takes the parameters' shapes away.
        self._shapes = {name: parameter.shape for name, parameter in self.named_parameters()}

    def forward(self, tokens: Tensor, *, targets: Tensor | None = None, documents: Tensor | None = None,
                dropout_keys: Tensor | None = None, cache: KeyValueCache | None = None, last: int | None = None) -> Tensor:
        """Next-token logits, or the loss of given targets.

        Args:
            tokens: `(batch, time)` int64; with those in the cache at most `settings.positions`.
            targets: `(batch, time)` int64, -1 where there is none: then the sum of their nats is returned, an fp32 scalar.
                Only those of `part`, `(batch, time / part.of)`.
            documents: `(batch, time)` int: a token sees its own document alone, and positions count from its first token.
            dropout_keys: `(batch,)` int64, what dropout draws from, one a sample; None: no dropout.
            cache: holds the tokens before these, and takes these in.
            last: logits of so many positions at the end alone.

        Returns:
            Logits `(batch, time or last, vocab_size)`, or the loss.
        """
        part = WHOLE if targets is None else self.part
        x, rotation, mask = self._embed(tokens, documents, dropout_keys, cache, part)
        if dropout_keys is not None and self.settings.dropout:
            x = dropped(x, dropout_keys, 0, self.settings.dropout, part.index)
        for block in self.layers:
            x = block(x, rotation, mask, dropout_keys, cache, part)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.final_norm(x if last is None else x[:, -last:])
        # The tied weight is used by name rather than held by a second module, so that it stands once in a state dict.
        weight = self.token_embedding.weight if self.settings.tied else self.output.weight
        if targets is None:
            return F.linear(x, weight)
        return summed_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), self.settings.loss_chunk)

    def _embed(self, tokens: Tensor, documents: Tensor | None, dropout_keys: Tensor | None, cache: KeyValueCache | None,
               part: SequencePart) -> tuple[Tensor, Tensor | None, Tensor | MaskInBlocks | None]:
        """The residual stream's start, and what all blocks share: the rotation of each position, and the attention mask, which
        is that of the whole sequence."""
        time, past = tokens.shape[1], cache.length if cache is not None else 0
        if past + time > self.settings.positions:
            raise ValueError(f"{past + time} tokens do not fit into {self.settings.positions} positions")
        if documents is not None and cache is not None:
            documents = documents if cache.documents is None else torch.cat([cache.documents, documents], dim=1)
            cache.documents = documents
        if documents is None:
            positions = torch.arange(past, past + time, device=tokens.device)[None]
        else:
            positions = positions_within(documents)[:, past:]
        positions = part.of_time(positions)
        x = self.token_embedding(part.of_time(tokens))
        if self.settings.position_encoding == "learned":
            x = x + self.position_embedding(positions)
        rotation = rotary_angles(positions, self.settings) if self.settings.position_encoding == "rotary" else None
        window = self.settings.window
        if cache is None and self._masks_in_blocks(tokens, dropout_keys) and (documents is not None or (window or time) < time):
            # In a plan nothing is compiled: causal attention without a mask keeps what FlexAttention does.
            return x, rotation, None if is_planned() else MaskInBlocks(time, window, documents, tokens.device)
        return x, rotation, attention_mask(time, past + time, window, documents, tokens.device)

    def _masks_in_blocks(self, tokens: Tensor, dropout_keys: Tensor | None) -> bool:
        """Whether masks go to FlexAttention, of which a compiler must make a kernel; of one block nothing could be left out."""
        s = self.settings
        drops = dropout_keys is not None and s.attention_dropout > 0
        fits = tokens.shape[1] > BLOCK and s.head_width >= LEAST_HEAD_WIDTH
        return on_gpu(tokens) and is_compiled(self.layers[0]) and fits and not drops

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, which are sharded, compiled and recomputed one at a time."""
        return list(self.layers)

    def initial_weight(self, name: str, seed: int) -> Tensor:
        """The full initial value of one parameter, fp32 on the CPU, drawn from (seed, name) alone: parameters can be made one
        by one, in any order, by whoever holds a part of them.

        Matrices and embeddings are normal with `init_std`, biases zero, norms one. Projections onto the residual stream are
        scaled by 1 / sqrt(2 x layers), the number of terms the stream adds up (Radford et al. 2019, section 2.3).
        """
        shape = self._shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape, device="cpu")
        if "norm." in name:
            return torch.ones(shape, device="cpu")
        std = self.settings.init_std
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * self.settings.layers)
        generator = torch_generator(seed, "initial weights", "gpt", name)
        return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its initial value."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_weight(name, seed))

    def parameter_count(self) -> int:
        """Trained numbers in all, a tied embedding counted once. Ask before ZeRO-3 takes the parameters apart."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, time: int) -> int:
        """Floating-point operations of forward and backward for one token of a sequence of `time` tokens.

        6 N + 12 layers heads head_width time: a multiply and an add for each of the N weights of matrix products (the output
        layer is one, the embedding look-ups are not), once forward and twice backward; and the two products of attention,
        counted over the full square as is the custom (Chowdhery et al. 2022, PaLM, appendix B), though kernels skip what is
        masked.
        Recomputed activations are not counted.
        """
        s = self.settings
        query, shared = s.heads * s.head_width, s.kv_heads * s.head_width
        matrices = 3 if s.activation == "swiglu" else 2
        layer = s.width * (2 * query + 2 * shared) + matrices * s.width * s.mlp_width
        return 6 * (s.layers * layer + self.vocab_size * s.width) + 12 * s.layers * query * time
