"""A training loop written by hand over nanoGPT's model, fp32: in one process, or under torchrun with one of torch's two ways of
data parallelism, or DeepSpeed's ZeRO.

    torchrun --nproc_per_node 2 gpt_by_hand.py --strategy ddp ...
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from model import GPT, GPTConfig  # nanoGPT's, on PYTHONPATH
from text import arguments
from torch import Tensor, nn


def spread(strategy: str, network: GPT, batch: int) -> tuple[nn.Module, Any]:
    """The network as it is to be called, and its optimizer."""
    if strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in network.transformer.h:
            fully_shard(block)
        fully_shard(network)
    matrices, rest = [p for p in network.parameters() if p.dim() >= 2], [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True), optimizer
    if strategy.startswith("zero"):
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": batch, "gradient_clipping": 1.0,
                  "zero_optimization": {"stage": int(strategy.removeprefix("zero"))}}
        engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)
        return engine, engine
    return network, optimizer


def main() -> None:
    settings = arguments(__doc__, strategy="single")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if settings.strategy.startswith("zero"):
        import deepspeed

        # It would compile a shared-memory all-reduce that training never calls, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    elif settings.strategy != "single":
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    network = GPT(GPTConfig(block_size=settings.time, vocab_size=settings.vocab_size, n_layer=settings.layers,
                            n_head=settings.heads, n_embd=settings.width, bias=True))
    batch = settings.batch // world_size
    called, optimizer = spread(settings.strategy, network, batch)
    tokens, draws = np.fromfile(settings.text, np.uint8), np.random.default_rng(rank)

    def block() -> tuple[Tensor, Tensor]:
        starts = draws.integers(len(tokens) - settings.time, size=batch)
        rows = torch.from_numpy(np.stack([tokens[s : s + settings.time + 1] for s in starts]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # the model views them flat

    for step in range(10**6):
        _, loss = called(*block())
        if called is optimizer:  # DeepSpeed's engine clips and zeroes by itself
            called.backward(loss)
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if called is not optimizer:
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 and rank == 0:
            print(f"loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
