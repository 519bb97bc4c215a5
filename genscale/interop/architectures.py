"""Which GPT a Hugging Face `config.json` describes, and which `config.json` describes a GPT: GPT-2, Llama and Qwen3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from genscale.errors import UserError
from genscale.families.gpt.settings import GPTSettings, ResolvedGPTSettings

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""transformers' class of each `model_type` that is read and written. A GPT's preset has the same names."""
WITHOUT_HEAD = {"gpt2": "GPT2Model", "llama": "LlamaModel", "qwen3": "Qwen3Model"}
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")
DEFAULT_ROPE_BASE = 10_000.0


class _Reader:
    """A config.json being read: what it lacks and what it asks for in vain is gathered, to be said at once."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.missing: list[str] = []
        self.unsupported: list[str] = []

    def need(self, key: str) -> int:
        """A size. 1 stands for one that is not there, so that reading can go on to the next."""
        if self.content.get(key) is None:
            self.missing.append(key)
        return self.size(key, 1)

    def size(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if type(value) is int and value >= 1:
            return value
        self.refuse(key, value, "whole numbers of at least 1")
        return 1

    def number(self, key: str, default: float) -> float:
        """One above 0."""
        return self.positive(key, self.get(key, default))

    def positive(self, key: str, value: Any) -> float:
        if type(value) in (int, float) and 0 < value < math.inf:
            return float(value)
        self.refuse(key, value, "numbers above 0")
        return 1.0

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            self.refuse(key, value, "true or false")
        return value is True

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, value, "an object")
        return value if isinstance(value, dict) else {}

    def get(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value

    def refuse(self, key: str, value: Any, supported: str) -> None:
        self.unsupported.append(f"{key} {repr(value)[:60]} (supported: {supported})")


def settings_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of `GPTSettings`, `vocab_size` among them, that a config.json comes to. Defaults are those of transformers.

    Args:
        content: of the file.
        name: of the folder, for messages.

    Raises:
        UserError: an architecture or an option that no GPT of ours has (names the supported ones), or a missing key.
    """
    kind, classes = content.get("model_type"), content.get("architectures")
    kind = kind if isinstance(kind, str) else None
    architecture = classes[0] if isinstance(classes, list) and classes else CLASSES.get(kind or "", "model")
    if kind not in CLASSES or architecture not in (CLASSES[kind], WITHOUT_HEAD[kind]):
        raise UserError(f"model.from: {name} is a {str(architecture)[:80]} (model_type {kind!r}), which cannot be started "
                        f"from; supported: {', '.join(CLASSES.values())}")
    reader = _Reader(content)
    if quantization := reader.mapping("quantization_config"):
        reader.refuse("quantization_config", quantization.get("quant_method", "?"), "none")
    fields = _gpt2_settings(reader) if kind == "gpt2" else _llama_settings(reader, kind)
    if reader.missing:
        raise UserError(f"model.from: {name}: config.json lacks {', '.join(reader.missing)}, without which the shape of a "
                        f"{CLASSES[kind]} is not known")
    if reader.unsupported:
        raise UserError(f"model.from: {name}: config.json asks for what is not supported of {CLASSES[kind]}: "
                        f"{'; '.join(reader.unsupported)}")
    return {"preset": kind, **fields}


def _gpt2_settings(reader: _Reader) -> dict[str, Any]:
    activation = reader.get("activation_function", "gelu_new")
    if activation not in GELU_TANH:
        reader.refuse("activation_function", activation, " or ".join(GELU_TANH))
    for key, supported in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
                           ("add_cross_attention", False)):
        if reader.get(key, supported) != supported:
            reader.refuse(key, reader.content[key], str(supported))
    width, heads = reader.need("n_embd"), reader.need("n_head")
    return {"layers": reader.need("n_layer"), "heads": heads, "width": width, "kv_heads": heads,
            "head_width": width // heads, "mlp_width": reader.size("n_inner", 4 * width),
            "positions": reader.need("n_positions"), "vocab_size": reader.need("vocab_size"),
            "position_encoding": "learned", "norm": "layernorm",
            "norm_eps": reader.number("layer_norm_epsilon", 1e-5), "activation": "gelu", "bias": True, "qk_norm": False,
            "tied": reader.flag("tie_word_embeddings", True), "window": None}


def _llama_settings(reader: _Reader, kind: str) -> dict[str, Any]:
    if reader.get("hidden_act", "silu") not in ("silu", "swish"):
        reader.refuse("hidden_act", reader.content["hidden_act"], "silu")
    bias = reader.flag("attention_bias", False)
    if kind == "llama" and reader.flag("mlp_bias", False) != bias:
        reader.refuse("mlp_bias", not bias, f"{bias}, as attention_bias is")
    if kind == "qwen3" and bias:
        reader.refuse("attention_bias", bias, "False")
    width, heads = reader.need("hidden_size"), reader.need("num_attention_heads")
    positions = reader.need("max_position_embeddings")
    return {"layers": reader.need("num_hidden_layers"), "heads": heads, "width": width,
            "kv_heads": reader.size("num_key_value_heads", heads),
            "head_width": reader.size("head_dim", 128 if kind == "qwen3" else width // heads),
            "mlp_width": reader.need("intermediate_size"), "positions": positions, "vocab_size": reader.need("vocab_size"),
            "position_encoding": "rotary", **_rope_settings(reader, positions), "norm": "rmsnorm",
            "norm_eps": reader.number("rms_norm_eps", 1e-6), "activation": "swiglu", "bias": bias, "qk_norm": kind == "qwen3",
            "tied": reader.flag("tie_word_embeddings", False), "window": _window(reader) if kind == "qwen3" else None}


def _rope_settings(reader: _Reader, positions: int) -> dict[str, Any]:
    # transformers 5 writes one `rope_parameters`; before, it was `rope_theta` and `rope_scaling`.
    rope = {**reader.mapping("rope_scaling"), **reader.mapping("rope_parameters")}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    keys = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}.get(kind, [])
    reader.missing += [f"rope_scaling.{key}" for key in keys if rope.get(key) is None]
    values = {key: reader.positive(f"rope_scaling.{key}", 1.0 if rope.get(key) is None else rope[key]) for key in keys}
    base = rope.get("rope_theta", reader.get("rope_theta", DEFAULT_ROPE_BASE))
    fields: dict[str, Any] = {"rope_base": reader.positive("rope_theta", base)}
    share = rope.get("partial_rotary_factor", reader.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        reader.refuse("partial_rotary_factor", share, "1.0")
    if kind in ("linear", "llama3"):
        fields |= {"rope_scaling": kind, "rope_factor": values["factor"]}
    elif kind != "default":
        reader.refuse("rope_type", kind, "default, linear or llama3")
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", reader.get("original_max_position_embeddings", positions))
        if type(original) is not int or original < 1:
            reader.refuse("original_max_position_embeddings", original, "whole numbers of at least 1")
        fields |= {"rope_original_positions": original, "rope_low_frequency": values["low_freq_factor"],
                   "rope_high_frequency": values["high_freq_factor"]}
    return fields


def _window(reader: _Reader) -> int | None:
    window = reader.size("sliding_window", 4096) if reader.flag("use_sliding_window", False) else None
    layers, first = reader.size("num_hidden_layers", 1), reader.get("max_window_layers", 28)
    kinds = reader.content.get("layer_types")
    if type(first) is not int:
        reader.refuse("max_window_layers", first, "whole numbers")
        first = 0
    if kinds is None:
        slides = window is not None
        kinds = ["sliding_attention"] * (slides and first < layers) + ["full_attention"] * (not slides or first > 0)
    kinds = set(map(str, kinds)) if isinstance(kinds, list) else {str(kinds)}
    if kinds <= {"full_attention"}:
        return None
    if kinds != {"sliding_attention"} or window is None:
        reader.refuse("layer_types", sorted(kinds), "the same for all layers")
    return window


def class_for(settings: GPTSettings) -> str:
    """The `model_type` whose transformers class computes what a GPT of these (resolved) settings computes.

    Raises:
        UserError: there is none; names the options in the way and the nearest class.
    """
    obstacles = {kind: _obstacles(settings, kind) for kind in CLASSES}
    kind = min(obstacles, key=lambda kind: len(obstacles[kind]))
    if obstacles[kind]:
        raise UserError(f"export: no Hugging Face class has this model; the nearest is {CLASSES[kind]}, which does not have "
                        f"{', '.join(obstacles[kind])}")
    return kind


def _obstacles(settings: GPTSettings, kind: str) -> list[str]:
    """The options that a class has not, each with what it has instead."""
    if kind == "gpt2":
        wanted = {"norm": "layernorm", "position_encoding": "learned", "activation": "gelu", "qk_norm": False, "window": None,
                  "kv_heads": settings.heads, "head_width": settings.width // settings.heads}
    else:
        wanted = {"norm": "rmsnorm", "position_encoding": "rotary", "activation": "swiglu", "qk_norm": kind == "qwen3"}
        wanted |= {"window": None} if kind == "llama" else {"bias": False}
    found = [f"model.{name} {_shown(getattr(settings, name))} (but {_shown(value)})" for name, value in wanted.items()
             if getattr(settings, name) != value]
    if kind != "qwen3" and settings.width % settings.heads:
        found.append(f"model.heads {settings.heads} (but divisors of model.width {settings.width})")
    return found


def _shown(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def config_json(settings: ResolvedGPTSettings, vocab_size: int, dtype: str, end_of_text: int) -> dict[str, Any]:
    """The config.json of a GPT of these settings, in the keys that transformers 4 and 5 both read.

    Args:
        dtype: of the weights beside it, in torch's words: float32 or bfloat16.

    Raises:
        UserError: as of `class_for`.
    """
    kind, s = class_for(settings), settings
    common = {"architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": vocab_size, "torch_dtype": dtype,
              "bos_token_id": end_of_text, "eos_token_id": end_of_text, "tie_word_embeddings": bool(s.tied),
              "initializer_range": float(s.init_std), "use_cache": True}
    if kind == "gpt2":
        return {**common, "n_layer": int(s.layers), "n_head": int(s.heads), "n_embd": int(s.width), "n_inner": int(s.mlp_width),
                "n_positions": int(s.positions), "n_ctx": int(s.positions), "activation_function": "gelu_new",
                "layer_norm_epsilon": float(s.norm_eps), "resid_pdrop": float(s.dropout), "embd_pdrop": float(s.dropout),
                "attn_pdrop": float(s.attention_dropout)}
    config = {**common, "num_hidden_layers": int(s.layers), "num_attention_heads": int(s.heads), "hidden_size": int(s.width),
              "num_key_value_heads": int(s.kv_heads), "head_dim": int(s.head_width), "intermediate_size": int(s.mlp_width),
              "max_position_embeddings": int(s.positions), "rms_norm_eps": float(s.norm_eps), "hidden_act": "silu",
              "rope_theta": float(s.rope_base), "rope_scaling": _rope_scaling(s), "attention_bias": bool(s.bias),
              "attention_dropout": float(s.attention_dropout)}
    if kind == "llama":
        return {**config, "mlp_bias": bool(s.bias)}
    if s.window is None:
        return {**config, "use_sliding_window": False}
    # max_window_layers 0: every layer has the window.
    return {**config, "use_sliding_window": True, "sliding_window": int(s.window), "max_window_layers": 0}


def _rope_scaling(settings: GPTSettings) -> dict[str, Any] | None:
    if settings.rope_scaling == "none":
        return None
    scaling = {"rope_type": settings.rope_scaling, "factor": float(settings.rope_factor)}
    if settings.rope_scaling == "linear":
        return scaling
    return {**scaling, "original_max_position_embeddings": int(settings.rope_original_positions),
            "low_freq_factor": float(settings.rope_low_frequency), "high_freq_factor": float(settings.rope_high_frequency)}
