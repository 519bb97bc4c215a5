"""What to tell a user whose run does not fit in memory."""

from __future__ import annotations

import torch

from genscale.config import Config
from genscale.parallel.engine import Engine
from genscale.parallel.strategies import SHARDS_MOST

WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "std::bad_alloc",
         "cublas_status_alloc_failed")
ONEDNN = "could not create a primitive"
"""All that oneDNN says; of a kind of operation that it has not, it says "could not create a primitive descriptor for ..."."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is what an error is about, of the device or the host; also one that a library has wrapped."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, RuntimeError) and (any(word in str(cause).lower() for word in WORDS) or str(cause) == ONEDNN):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def advice(config: Config, engine: Engine) -> str:
    """One line: where memory ran out, the settings that decide how much of it is needed, and what to try first."""
    processes, strategy, micro_batch_size = engine.processes, engine.strategy, engine.micro_batch_size
    checkpointing = config.parallel.activation_checkpointing
    facts = [f"train.micro_batch_size is {micro_batch_size}"]
    sizes = [name for name in ("sequence_length", "size") if hasattr(config.data, name)]
    facts += [f"data.{name} is {getattr(config.data, name)}" for name in sizes]
    facts += [f"parallel.activation_checkpointing is {checkpointing}", f"parallel.strategy is {strategy}"]
    smaller = max((size for size in range(1, micro_batch_size) if micro_batch_size % size == 0), default=None)
    tries = [f"train.micro_batch_size {smaller}"] if smaller else []
    tries += ["parallel.activation_checkpointing full"] if checkpointing != "full" else []
    tries += [f"parallel.strategy {SHARDS_MOST} on more processes"] if strategy != SHARDS_MOST else []
    tries += ["a smaller model"]
    where = "the host" if processes.device.type == "cpu" else str(processes.device)
    return (f"out of memory on {where}, rank {processes.rank}, at {processes.doing}: {', '.join(facts)}; try "
            f"{', then '.join(tries)}")
