"""Whether a forward is the second one, made in backward by activation checkpointing. What a forward does besides its result
(the running statistics of a BatchNorm) must then not be done again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_state = threading.local()  # backward runs in threads of its own


@contextmanager
def recomputing() -> Iterator[None]:
    """Around a recomputed forward."""
    before = is_recomputing()
    _state.active = True
    try:
        yield
    finally:
        _state.active = before


def is_recomputing() -> bool:
    """Inside `recomputing` in this thread."""
    return getattr(_state, "active", False)
