"""transformers.Trainer with GPT2LMHeadModel of our weights on our blocks, a step at a time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.config import Config
from genscale.data.loader import StepLoader
from genscale.data.text import TextData
from genscale.interop.architectures import config_json
from genscale.interop.weights import write_weights
from genscale.models.gpt import resolved


def blocks_of(config: Config, count: int) -> list[Tensor]:
    """The first `count` training blocks `(sequence_length + 1,)` in the order in which our steps read them."""
    data, batch = TextData(config.data, config.run.seed), config.train.global_batch_size
    loader = StepLoader(data, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1, workers=0,
                        prefetch_steps=2)
    rows: list[Tensor] = []
    while len(rows) < count:
        rows += list(loader.next_batch()[0]["tokens"].long())
    loader.close()
    return rows[:count]


def huggingface_twin(config: Config, vocab_size: int, read: Callable[[str], Tensor]) -> Any:
    """GPT2LMHeadModel with the given weights of ours."""
    import json

    from transformers import AutoModelForCausalLM

    settings = resolved(config.model)
    with tempfile.TemporaryDirectory() as folder:
        content = config_json(settings, vocab_size, "float32", end_of_text=0)
        Path(folder, "config.json").write_text(json.dumps(content))
        write_weights("gpt2", settings, vocab_size, read, torch.float32, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train_with_transformers(config: Config, model: Any, rows: list[Tensor], steps: int, precision: str,
                            after_step: Callable[[float], None], **options: Any) -> float:
    """`transformers.Trainer.train()` over the blocks in their order, with its defaults but for what both sides share.

    Args:
        after_step: called between two of its steps with the seconds of the one that ended.

    Returns:
        The mean loss of all steps.
    """
    from transformers import Trainer as TheirTrainer
    from transformers import TrainerCallback, TrainingArguments

    batch, micro = config.train.global_batch_size, config.train.micro_batch_size or config.train.global_batch_size

    class InOrder(TheirTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Turn(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = self.started or time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            # No synchronisation, as on our side: once the queue is full, steps end as often as the device ends them.
            after_step(time.perf_counter() - self.started)
            self.started = time.perf_counter()  # its next batch is fetched on its own time

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro, max_steps=steps,
            learning_rate=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, adam_beta1=config.optimizer.betas[0],
            adam_beta2=config.optimizer.betas[1], max_grad_norm=config.train.clip, lr_scheduler_type="constant",
            bf16=precision == "bf16", use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
            disable_tqdm=True, **options)
        # Labels are the inputs: their model shifts them itself, so it has one target fewer a row than ours.
        rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in rows]
        return InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[Turn()]).train().training_loss
