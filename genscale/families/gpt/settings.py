"""What a GPT is made of: one settings class for GPT-2, GPT-3, Llama, Qwen3 and what lies between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from genscale.errors import UserError, nearest_divisors
from genscale.settings.mistakes import MOST

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"position_encoding": "learned", "norm": "layernorm", "norm_eps": 1e-5, "activation": "gelu", "bias": True,
             "qk_norm": False, "tied": True, "rope_base": 10_000.0},
    "llama": {"position_encoding": "rotary", "norm": "rmsnorm", "norm_eps": 1e-5, "activation": "swiglu", "bias": False,
              "qk_norm": False, "tied": False, "rope_base": 500_000.0},
    "qwen3": {"position_encoding": "rotary", "norm": "rmsnorm", "norm_eps": 1e-6, "activation": "swiglu", "bias": False,
              "qk_norm": True, "tied": False, "rope_base": 1_000_000.0},
}
"""What a preset says where a setting is left out. Radford et al. 2019 (GPT-2); Grattafiori et al. 2024 (Llama 3); Qwen team
2025 (Qwen3)."""
MLP_MULTIPLE = 64
MAX_PARAMETERS = 10**14
"""More than any machine holds."""


@dataclass(frozen=True)
class GPTSettings:
    """The `model` section of a GPT. What is left out is as the preset has it."""

    family: Literal["gpt"] = "gpt"
    """Kind of model."""
    from_: str | None = None
    """Start from the weights of a Hugging Face folder or hub name (GPT-2, Llama or Qwen3), or of a run folder or a checkpoint
    of genscale's own; its shape becomes the model's, and its tokenizer the default of data.tokenizer."""
    preset: Literal["gpt2", "llama", "qwen3"] = "gpt2"
    """Whose choices hold for what is left out below."""
    layers: PositiveInt = 6
    """Transformer blocks."""
    heads: PositiveInt = 6
    """Attention heads (of the queries)."""
    width: PositiveInt = 384
    """Features of a token between blocks."""
    kv_heads: PositiveInt | None = None
    """Heads of keys and values, each shared by heads / kv_heads queries (default: as many as heads; fewer is grouped-query
    attention, 1 is multi-query)."""
    head_width: PositiveInt | None = None
    """Features of a head (default: width / heads, which must then divide)."""
    mlp_width: PositiveInt | None = None
    """Features inside the MLP (default: 4 x width; with swiglu 8/3 x width, rounded up to a multiple of 64)."""
    positions: PositiveInt = 1024
    """Longest sequence the model can read, in tokens."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding table (default: the tokenizer's vocabulary, rounded up to a multiple of 64)."""
    position_encoding: Literal["learned", "rotary"] | None = None
    """learned: an embedding for each position (gpt2); rotary: queries and keys are rotated (llama, qwen3)."""
    rope_base: PositiveFloat | None = None
    """rotary: base of the wavelengths."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """rotary: stretch positions beyond those trained on: linear, all wavelengths alike; llama3, the long ones only."""
    rope_factor: PositiveFloat = 1.0
    """rope_scaling: by how much."""
    rope_original_positions: PositiveInt = 8192
    """llama3 scaling: longest sequence before stretching."""
    rope_low_frequency: PositiveFloat = 1.0
    """llama3 scaling: wavelengths above rope_original_positions / this are stretched in full."""
    rope_high_frequency: PositiveFloat = 4.0
    """llama3 scaling: wavelengths below rope_original_positions / this are left alone."""
    norm: Literal["layernorm", "rmsnorm"] | None = None
    """Normalisation before attention, before the MLP and at the end."""
    norm_eps: PositiveFloat | None = None
    """Added to the variance (layernorm) or the mean square (rmsnorm)."""
    activation: Literal["gelu", "swiglu", "relu2"] | None = None
    """Activation of the MLP: gelu (tanh form), swiglu (a gate beside it) or relu2 (squared ReLU)."""
    bias: bool | None = None
    """Biases in linear layers and LayerNorms."""
    qk_norm: bool | None = None
    """Normalise queries and keys, each head by itself, before they are rotated."""
    tied: bool | None = None
    """The output layer shares the token embedding's weights."""
    window: PositiveInt | None = None
    """Sliding window: a token sees itself and at most window - 1 tokens before it (default: all)."""
    dropout: NonNegativeFloat = 0.0
    """Share of activations dropped in training, of the embeddings and of what each block adds to the residual stream."""
    attention_dropout: NonNegativeFloat = 0.0
    """Share of attention weights dropped in training (slow: no fused kernel can have masks addressed by sample)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections onto the residual stream get init_std / sqrt(2 x layers)."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits are held at once while the loss and its gradient are computed (default: 64 MiB of logits on a CPU,
    2 GiB on a GPU)."""


class ResolvedGPTSettings(GPTSettings):
    """Settings with nothing left open but `window` and `loss_chunk`, as `resolved` returns them; for the type checker, which
    cannot see what has been filled in."""

    kv_heads: int
    head_width: int
    mlp_width: int
    position_encoding: Literal["learned", "rotary"]
    rope_base: float
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Literal["gelu", "swiglu", "relu2"]
    bias: bool
    qk_norm: bool
    tied: bool


def resolved(settings: GPTSettings) -> ResolvedGPTSettings:
    """The settings with nothing left open: the preset's choices and the derived sizes filled in.

    Raises:
        UserError: settings that no GPT can have.
    """
    _check_sizes(settings)
    preset = {key: value for key, value in PRESETS[settings.preset].items() if getattr(settings, key) is None}
    filled = replace(settings, **preset)
    filled = replace(filled, kv_heads=filled.kv_heads or filled.heads)
    if filled.head_width is None:
        _check_heads_divide(filled.width, filled.heads)
        filled = replace(filled, head_width=filled.width // filled.heads)
    if filled.mlp_width is None:
        wanted = -(-8 * filled.width // 3) if filled.activation == "swiglu" else 4 * filled.width
        multiple = MLP_MULTIPLE if filled.activation == "swiglu" else 1
        filled = replace(filled, mlp_width=-(-wanted // multiple) * multiple)
    whole = cast(ResolvedGPTSettings, filled)  # every setting has its value; the class stays, by which settings are equal
    _check(whole)
    count = parameter_count(whole)
    if count > MAX_PARAMETERS:
        raise UserError(f"model: {whole.layers} layers of model.width {whole.width}, model.mlp_width {whole.mlp_width} and "
                        f"{whole.heads} heads of {whole.head_width} are {count:.1e} parameters; at most {MAX_PARAMETERS:.0e}")
    return whole


def parameter_count(settings: ResolvedGPTSettings) -> int:
    """The parameters of a GPT of these settings; without its token embedding where model.vocab_size is left open."""
    s = settings
    heads, shared = s.heads * s.head_width, s.kv_heads * s.head_width
    layer_norm = s.norm == "layernorm"
    norm = s.width * (1 + (layer_norm and s.bias))
    attention = s.width * (2 * heads + 2 * shared) + s.bias * (heads + 2 * shared + s.width)
    attention += s.qk_norm * 2 * s.head_width
    up = s.mlp_width * (2 if s.activation == "swiglu" else 1)
    mlp = s.width * (up + s.mlp_width) + s.bias * (up + s.width)
    tables = (s.vocab_size or 0) * (1 if s.tied else 2) + s.positions * (s.position_encoding == "learned")
    return s.layers * (attention + mlp + 2 * norm) + norm + tables * s.width


def _check_sizes(settings: GPTSettings) -> None:
    for name in ("layers", "heads", "width", "kv_heads", "head_width", "mlp_width", "positions", "vocab_size"):
        value, most = getattr(settings, name), MOST[f"model.{name}"]
        if value is not None and value > most:
            raise UserError(f"model.{name}: must be at most {most}, not {value}")


def _check_heads_divide(width: int, heads: int) -> None:
    if width % heads:
        below = width // heads * heads
        widths = " or ".join(str(w) for w in (below, below + heads) if w > 0)
        raise UserError(f"model.heads: {heads} does not divide model.width {width}; nearest allowed: model.heads "
                        f"{nearest_divisors(width, heads)}, or model.width {widths} (or set model.head_width)")


def _check(settings: ResolvedGPTSettings) -> None:
    if settings.heads % settings.kv_heads:
        raise UserError(f"model.kv_heads: {settings.kv_heads} does not divide model.heads {settings.heads}; nearest allowed: "
                        f"{nearest_divisors(settings.heads, settings.kv_heads)}")
    if settings.position_encoding == "rotary" and settings.head_width % 2:
        raise UserError(f"model.head_width: {settings.head_width} is odd, and rotary positions turn pairs of features; nearest "
                        f"allowed: {settings.head_width + 1} (or model.position_encoding learned)")
    for name in ("dropout", "attention_dropout"):
        value = getattr(settings, name)
        if value >= 1:
            raise UserError(f"model.{name}: {value} would drop everything; it must be a share below 1, such as 0.1")
    if settings.rope_scaling != "none" and settings.position_encoding != "rotary":
        raise UserError(f"model.rope_scaling: {settings.rope_scaling} needs model.position_encoding rotary, not "
                        f"{settings.position_encoding}; set that, or model.rope_scaling none")
    if settings.rope_scaling == "none" and settings.rope_factor != 1:
        raise UserError(f"model.rope_factor: {settings.rope_factor} has no effect with model.rope_scaling none; set linear or "
                        "llama3, or leave it out")
    if settings.rope_scaling == "llama3" and settings.rope_high_frequency <= settings.rope_low_frequency:
        raise UserError(f"model.rope_high_frequency: {settings.rope_high_frequency} must be above model.rope_low_frequency "
                        f"{settings.rope_low_frequency}, as in Llama 3.1: 4 and 1")
