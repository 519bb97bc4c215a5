"""Whether the data that is there is what a checkpoint was trained on: its plan (`Data.plan`) against the recorded one.

Where data lies is not what it is: a run may go on with the same content elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

LATER = ("probes", "validation_content")
"""Ends of keys that checkpoints of earlier versions do not have."""


def digest_of(arrays: Iterable[np.ndarray]) -> str:
    """The digest of their bytes, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plan_differences(recorded: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """The keys in which two plans differ. Locations count only where no content was recorded to compare."""
    keys = {key for key in recorded.keys() | plan.keys() if recorded.get(key) != plan.get(key)}
    keys -= {key for key in keys if key.endswith(LATER) and key not in recorded}
    if any(key.endswith("content") and key != "validation_content" for key in recorded):
        keys.discard("source")
    if "validation_content" in recorded and "validation_content" in plan:
        keys.discard("validation_source")
    return sorted(keys)


def only_moved(key: str, was: Any, now: Any, plan: dict[str, Any]) -> bool:
    """Whether a setting that changed says no more than where something lies, given that the plans do not differ."""
    if key == "data.sources" and isinstance(was, list) and isinstance(now, list):
        return [{**entry, "source": None} for entry in was] == [{**entry, "source": None} for entry in now]
    proof = {"data.source": "content", "data.validation_source": "validation_content", "data.tokenizer": "tokenizer"}.get(key)
    return proof is not None and any(known == proof or known == f"source_{proof}" for known in plan)
