"""Byte-level vocabularies: each byte is a character of an alphabet, so that a token has as many characters as it stands for
bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def byte_lengths(content: Mapping[str, Any], vocabulary: Mapping[str, int], size: int) -> np.ndarray | None:
    """UTF-8 bytes each id stands for, int64 `(vocab,)`, special tokens 0; None where that is not known exactly.

    Args:
        content: of a `tokenizer.json`.
        vocabulary: id of each token, without those added to the model's.
        size: the number of ids.
    """
    if content["model"].get("type") != "BPE" or content.get("normalizer") or not _is_byte_level(content.get("pre_tokenizer")):
        return None
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    if any(not token["special"] for token in added.values()):
        return None  # a plain added token may swallow the spaces around it
    alphabet = set(byte_alphabet())
    lengths = np.zeros(size, np.int64)
    for token, number in vocabulary.items():
        if number in added:
            continue
        if not alphabet.issuperset(token):
            return None
        lengths[number] = len(token)
    return lengths


def byte_alphabet() -> list[str]:
    """The character of each byte, in no order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _is_byte_level(pre_tokenizer: dict | None) -> bool:
    """Whether words are mapped byte by byte and nothing else adds or drops a byte."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    lossless = all(step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
                   for step in steps)
    return bool(byte_level) and lossless and not any(step["add_prefix_space"] for step in byte_level)
