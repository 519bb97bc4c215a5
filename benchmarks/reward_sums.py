"""Sums, of which the text forgets the carry seven times in ten, and what rewards make of it: accuracy and time, over seeds.

    python benchmarks/reward_sums.py --out benchmarks/results/reward-sums-cpu.json      # two quiet cores: about four minutes

Runs configs/gpt/sums.yaml and then configs/reward/sums.yaml from it, as `genscale train` does, and looks at the thousand sums
that neither has: the share of right answers of those that are likeliest (greedy) and of those that are drawn (sampled, eight to
a sum), before and after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import genscale
from genscale.families import family
from report import ROOT, circumstances, write

import numpy as np
import torch
from torch import nn

LIMITS = {"greedy_before": 0.40, "greedy": 0.95, "sampled": 0.90, "minutes": 5}
TEXT, REWARDED = ROOT / "configs/gpt/sums.yaml", ROOT / "configs/reward/sums.yaml"


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """A text model, and the same after the rewards."""
    place = {"run.dir": folder, "run.seed": seed, "tracking.wandb": "disabled"}
    text, text_seconds = timed(genscale.config(TEXT, {**place, "run.name": f"text-{seed}"}))
    tuned, seconds = timed(genscale.config(REWARDED, {**place, "run.name": f"rewarded-{seed}", "model.from": text.folder}))
    run = genscale.load(tuned.folder)
    return {"seed": seed, "before": accuracy(run, run.networks["reference"]), "after": accuracy(run, run.networks["policy"]),
            "text_seconds": text_seconds, "reward_seconds": seconds}


def timed(config: genscale.Config) -> tuple[Any, dict[str, float]]:
    """The run, and its seconds by the clock and of CPU time, from reading the config to the last checkpoint."""
    began, cpu_began = time.perf_counter(), time.process_time()
    run = genscale.train(config)
    return run, {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - cpu_began, 1)}


@torch.no_grad()
def accuracy(run: Any, writer: nn.Module) -> dict[str, float]:
    """The share of right answers that a network writes to all held-out sums of a run."""
    objective, config = run.objective, run.config
    samples = family(config.model.family).validation(config.data, config.run.seed)
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
    batch |= {"sample": torch.arange(len(samples)), "prompt": batch["prompt"].long()}
    networks = objective.networks
    objective.networks = {"policy": writer, "reference": networks["reference"]}
    found = objective.summarise({name: float(value) for name, value in objective.evaluate(objective.networks, batch).items()})
    objective.networks = networks
    return {"sums": len(samples), "greedy": round(found["greedy_reward"], 4), "sampled": round(found["reward_exact"], 4),
            "divergence": round(found["divergence"], 4)}


def is_met(rows: list[dict[str, Any]]) -> bool:
    minutes = sum(row[part]["wall"] for row in rows for part in ("text_seconds", "reward_seconds")) / 60
    return minutes <= LIMITS["minutes"] and all(
        row["before"]["greedy"] <= LIMITS["greedy_before"] and row["after"]["greedy"] >= LIMITS["greedy"]
        and row["after"]["sampled"] >= LIMITS["sampled"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = circumstances(["torch"]) | {"threads": arguments.threads, "limits": LIMITS}
    rows = []
    with tempfile.TemporaryDirectory(prefix="reward-sums-") as folder:
        for seed in map(int, arguments.seeds.split(",")):
            rows.append(measure(seed, Path(folder)))
            print(rows[-1], flush=True)
    write({**result, "met": is_met(rows), "runs": rows}, arguments.out)


if __name__ == "__main__":
    main()
