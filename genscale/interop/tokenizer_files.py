"""The tokenizer of a run as files that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from genscale.data.text.tokenizers import END_OF_TEXT, ByteTokenizer, Tokenizer
from genscale.interop.huggingface import TOKENIZER
from genscale.reading import read_json

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


def write_tokenizer(tokenizer: Tokenizer, positions: int, folder: Path, kept: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (special tokens and chat template in it) and generation_config.json.

    Args:
        positions: longest sequence of the model.
        kept: a folder that may hold the generation_config.json of the model that the run started from.
    """
    if isinstance(tokenizer, ByteTokenizer):
        (folder / TOKENIZER).write_text(byte_tokenizer_json(), encoding="utf-8")
    else:
        tokenizer.save(folder)
    backend = Backend.from_file(str(folder / TOKENIZER))
    end = backend.id_to_token(tokenizer.end_of_text)
    # This class takes tokenizer.json as it stands; those of single models build theirs anew, and not always alike.
    config = {"bos_token": end, "eos_token": end, **_json(folder / TOKENIZER_CONFIG), "model_max_length": int(positions),
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder / TOKENIZER_CONFIG, config)
    # A chat model's turns end otherwise than its documents; either ends what it generates.
    last = backend.token_to_id(config["eos_token"])
    ends = sorted({tokenizer.end_of_text, *([] if last is None else [last]), *tokenizer.companions.end_ids})
    ids = {"bos_token_id": backend.token_to_id(config["bos_token"]), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    _write(folder / GENERATION_CONFIG, {**ids, **_json(kept / GENERATION_CONFIG)})


def byte_tokenizer_json() -> str:
    """A tokenizer.json with the ids of `ByteTokenizer`: a byte-level BPE without merges, each byte under its own number."""
    backend = Backend(models.BPE(vocab={_byte_character(byte): byte for byte in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend.to_str()


def _byte_character(byte: int) -> str:
    """What stands for a byte in a byte-level vocabulary: itself if it shows in Latin-1, else the next free character from 256
    on (Radford et al. 2019, `bytes_to_unicode` of the code)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in shown:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in shown].index(byte))


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
