"""A small GPT on the texts of reward_space.py, trained as a user would: `genscale.train`, with a reward given in Python."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import genscale
from genscale.tracking.metrics_file import read_metrics
from reward_space import BETA, LONGEST, MASK, REWARD, TEXTS, TOKENS, optimum, total_variation
from reward_tabular import by_seed, gaps

import torch
from torch import Tensor, nn

ASKED = ["aa", "ab", "ac", "ba"]
"""The four prompts, in letters of the same alphabet: the policy knows four tokens, and writes no others."""
TOKENS_OF = {"a": 0, "b": 1, "c": 2, "<|endoftext|>": 3}
SETTINGS: dict[str, Any] = {
    "model.from": "scratch", "model.preset": "llama", "model.layers": 2, "model.heads": 2, "model.width": 48,
    "model.positions": 8, "model.init_std": 0.1, "data.prompt_tokens": 2, "data.row_bytes": 64, "data.lanes": 4,
    "objective.rewards": [{"name": "as_many"}], "objective.tokens": LONGEST, "objective.beta": BETA, "objective.group": 64,
    "train.global_batch_size": 4, "train.steps": 600, "train.precision": "fp32", "train.log_every": 100,
    "optimizer.name": "muon", "optimizer.lr": 3e-3, "optimizer.betas": [0.9, 0.99], "optimizer.weight_decay": 0,
    "schedule.warmup_steps": 50, "schedule.final_share": 0, "tracking.wandb": "disabled",
}  # fmt: skip
"""A batch is each prompt once, with a large group. The weights are drawn wide: the reference prefers some texts to others."""


class AsMany(genscale.TextReward):
    """1 where the answer has as many a's as the prompt's number, else 0."""

    def judge(self, answers: Sequence[genscale.Answer]) -> list[float]:
        return [float(answer.text.count("a") == ASKED.index(answer.prompt)) for answer in answers]


def measure(seed: int, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one policy, and looks at all texts."""
    source = make_source(folder)
    place = {"run.dir": folder, "run.name": f"seed-{seed}", "run.seed": seed, "data.source": source,
             "data.validation_source": source, "data.tokenizer": make_tokenizer(folder)}
    config = genscale.config("reward", {**SETTINGS, **place, **settings})
    began, cpu_began = time.perf_counter(), time.process_time()
    run = genscale.train(config, rewards={"as_many": AsMany})
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    networks = genscale.load(run.folder).networks
    policy, reference = (log_texts(networks[name]) for name in ("policy", "reference"))
    best = optimum(reference, REWARD)
    logged = [line["validation_gap"] for line in read_metrics(run.folder / "metrics.jsonl") if "validation_gap" in line]
    return {"seed": seed, "total_variation_of_the_reference": by_seed(total_variation(reference, best), 1)[0],
            "total_variation": by_seed(total_variation(policy, best), 1)[0],
            "of_prompts": [round(value, 4) for value in total_variation(policy, best).tolist()],
            **{name: values[0] for name, values in gaps(policy, reference, REWARD, 1).items()},
            "validation_gap": round(logged[-1], 4), "seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}


@torch.no_grad()
def log_texts(network: nn.Module) -> Tensor:
    """Log p of all texts `(prompts, texts)`."""
    asked = torch.tensor([[TOKENS_OF[letter] for letter in prompt] for prompt in ASKED])
    rows = []
    for prompt in asked:
        read = torch.cat([prompt.expand(len(TEXTS), -1), TOKENS], 1)
        log_p = network(read[:, :-1])[:, len(prompt) - 1 :, : len(TOKENS_OF)].double().log_softmax(-1)
        rows.append((log_p.gather(-1, TOKENS[..., None])[..., 0] * MASK).sum(1))
    return torch.stack(rows)


def make_source(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ASKED))
    return path


def make_tokenizer(folder: Path) -> Path:
    """Of letters alone."""
    import tokenizers
    from tokenizers import decoders, models

    found = tokenizers.Tokenizer(models.BPE(vocab=TOKENS_OF, merges=[]))
    found.decoder = decoders.Fuse()
    found.add_special_tokens(["<|endoftext|>"])
    path = folder / "tokenizer.json"
    found.save(str(path))
    return path
