"""What a forward and a backward change besides gradients is put back after a rehearsal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from genscale.parallel.engine import Engine
from genscale.training.kept_buffers import KeptBuffers


@contextmanager
def without_a_trace(engine: Engine) -> Iterator[None]:
    """Inside, updates are rehearsed and all left out. Afterwards buffers, modes of the layers and the random state are as
    before; who watches the gradients sees none of it."""
    watcher, engine.on_gradients = engine.on_gradients, None
    modes = [(layer, layer.training) for module in engine.modules.values() for layer in module.modules()]
    buffers = KeptBuffers([buffer for name in engine.modules for buffer in engine.moving_buffers(name)])
    device = engine.processes.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        buffers.put_back(True)
        for layer, training in modes:
            layer.training = training
        engine.on_gradients = watcher
