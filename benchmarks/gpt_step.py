"""One training step of a GPT as a call: ours, and that of transformers.Trainer with GPT2LMHeadModel of the same weights."""

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
from genscale.objectives import FAMILIES
from genscale.objectives.base import Objective
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.training.guards import StopSignal
from genscale.training.optimizers import make_optimizer
from genscale.training.trainer import StepReport, Trainer


class OurSteps:
    """What `genscale train` does in a step: StepLoader, LanguageModel, engine and Trainer.train_step; without hooks."""

    def __init__(self, config: Config) -> None:
        plan = plan_parallel(config.parallel, config.train.precision)
        self.precision = config.train.precision = plan.precision
        batch = config.train.global_batch_size
        micro = config.train.micro_batch_size or batch
        self.data = TextData(config.data, config.run.seed)
        self.objective: Objective = FAMILIES["gpt"].build_objective(config, self.data)
        self.parameters = self.objective.networks["gpt"].parameter_count()
        self.processes = Processes(need_group=plan.needs_group)
        engine = build_engine(plan, self.processes, config.parallel, plan.precision, config.train.clip, micro, batch // micro)
        engine.prepare(self.objective.networks, lambda module: make_optimizer(module, config.optimizer),
                       {"gpt": self.objective.initial_weights("gpt")})
        self.loader = StepLoader(self.data, global_batch_size=batch, micro_batch_size=micro, rank=0, world_size=1,
                                 workers=config.data.workers, prefetch_steps=config.data.prefetch_steps,
                                 pin_memory=self.processes.device.type == "cuda")
        self._trainer = Trainer(config, self.objective, engine, self.loader, hooks=[], last_good=lambda: "none")
        self._stop, self._step = StopSignal(), 0

    def __call__(self) -> StepReport:
        self._step += 1
        return self._trainer.train_step(self._step, self._stop)

    def close(self) -> None:
        self.loader.close()
        self.processes.close()


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
