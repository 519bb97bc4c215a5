"""transformers.Trainer with GPT2LMHeadModel, with its defaults but for what both sides share."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from text import Blocks, arguments
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


def gpt2(settings: Any) -> GPT2LMHeadModel:
    """Of the shape that the command line gives, without dropout."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=settings.vocab_size, n_positions=settings.time, n_embd=settings.width,
                                      n_layer=settings.layers, n_head=settings.heads, resid_pdrop=0.0, embd_pdrop=0.0,
                                      attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))


class Watch(TrainerCallback):
    """Calls `after_step` between two steps with the seconds of the one that ended."""

    def __init__(self, after_step: Callable[[float], None]) -> None:
        self.after_step, self.started = after_step, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # No synchronisation, as on our side: once the queue is full, steps end as often as the device ends them.
        self.after_step(time.perf_counter() - self.started)
        self.started = time.perf_counter()  # its next batch is fetched on its own time


def train(model: Any, rows: Any, steps: int, *, batch: int, micro: int, precision: str,
          after_step: Callable[[float], None] | None = None, **options: Any) -> None:
    """`Trainer.train()` over rows of input_ids and labels."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, max_steps=steps,
            learning_rate=1e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
            lr_scheduler_type="constant", bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(), report_to=[],
            save_strategy="no", disable_tqdm=True, **options)
        Trainer(model=model, args=settings, train_dataset=rows, callbacks=[Watch(after_step)] if after_step else []).train()


if __name__ == "__main__":
    shape = arguments(__doc__, precision="fp32")
    train(gpt2(shape), Blocks(shape.text, shape.time), 10**6, batch=shape.batch, micro=shape.batch, precision=shape.precision,
          logging_steps=10)
