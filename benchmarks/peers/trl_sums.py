"""TRL's RLOO or GRPO on sums, from a Hugging Face folder to another: what its users would write, in fp32 without recomputation,
which it would do without on a CPU. Prints its seconds as JSON. Nothing here loads genscale."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

KINDS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    return [float(said == wanted) for said, wanted in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "prompts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", choices=list(KINDS), required=True)
    for name in ("steps", "batch", "group", "tokens", "seed", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "beta", "final_share"):
        parser.add_argument(f"--{name}", type=float, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer_class, config_class = KINDS[arguments.kind]
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = Dataset.from_list([json.loads(line) for line in arguments.prompts.read_text().splitlines()])
    settings = config_class(
        output_dir=str(arguments.out / "trainer"), max_steps=arguments.steps, num_generations=arguments.group,
        per_device_train_batch_size=arguments.batch * arguments.group, max_completion_length=arguments.tokens,
        beta=arguments.beta, learning_rate=arguments.lr, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": arguments.final_share},
        warmup_steps=arguments.warmup, seed=arguments.seed, bf16=False, gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=50)
    trainer = trainer_class(model=AutoModelForCausalLM.from_pretrained(arguments.model), reward_funcs=right, args=settings,
                            train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(arguments.model))
    trainer.train()
    said = {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu_began, 1)}
    trainer.save_model(str(arguments.out))
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
