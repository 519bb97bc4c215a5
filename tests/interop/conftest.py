"""Tiny models made by transformers, every weight of them random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from genscale.interop.tokenizer_files import byte_tokenizer_json

VOCAB, POSITIONS = 263, 48  # the bytes, the end of text, and a few rows that stand for nothing
IDS = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 256}
LLAMA = {**IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-untied": lambda: GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "llama": lambda: LlamaConfig(**LLAMA),
    "llama3-tied": lambda: LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear-bias": lambda: LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3, head_dim=16,
                                             rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5_000.0}),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=12),
    "qwen3-window-tied": lambda: Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True, use_sliding_window=True,
                                             sliding_window=5, max_window_layers=0),
}


def make_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model none of whose weights is zero or one, so that each has an effect that a comparison sees."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="session")
def model_named() -> Callable[..., PreTrainedModel]:
    """`model_named("llama")`; keyword arguments change its config."""
    return make_model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(model)`: a folder that transformers wrote, with a tokenizer of bytes."""

    def save(model: PreTrainedModel, name: str = "model", **options: Any) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder, **options)
        (folder / "tokenizer.json").write_text(byte_tokenizer_json())
        return folder

    return save


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of every tiny model in turn."""
    return request.param


@pytest.fixture(scope="session")
def some_tokens() -> torch.Tensor:
    """`(2, 24)` int64."""
    return torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
