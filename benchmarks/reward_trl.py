"""The sums of configs/reward/sums.yaml by genscale and by TRL: one network, prompts, steps, answers; accuracy and seconds.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 && /tmp/trl/bin/pip install trl datasets
    python benchmarks/reward_trl.py --python /tmp/trl/bin/python --out benchmarks/results/reward-trl-cpu.json

Both begin from one text model, which genscale exports, and have one thread; TRL (peers/trl_sums.py) at three learning rates of
which ours is the middle one, with our other settings. Both are judged by one judge on the thousand held-out sums. Seconds are
from reading the model to the last step, without the imports; ours include an evaluation and a checkpoint. Seven quiet minutes
with --kinds rloo, eleven with both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import genscale
from genscale.verbs.export import main as export
from report import ROOT, circumstances, write
from reward_sums import REWARDED, TEXT, accuracy, timed

import torch

RATES = (0.5, 1.0, 2.0)
"""Of our learning rate."""


def compare(seed: int, steps: int | None, kinds: list[str], python: str, folder: Path) -> dict[str, Any]:
    place = {"run.dir": folder, "run.seed": seed, "tracking.wandb": "disabled"}
    text, _ = timed(genscale.config(TEXT, {**place, "run.name": f"text-{seed}"}))
    settings = {**place, "run.name": f"rewarded-{seed}", "model.from": text.folder}
    config = genscale.config(REWARDED, settings | ({"train.steps": steps} if steps else {}))
    tuned, seconds = timed(config)
    run = genscale.load(tuned.folder)
    model = folder / f"model-{seed}"
    export([str(text.folder), "--out", str(model)])
    rows = [{"trainer": "genscale", "lr": config.optimizer.lr, "seconds": seconds, **accuracy(run, run.networks["policy"])}]
    print(json.dumps(rows[0]), flush=True)
    for kind in kinds:
        for rate in RATES:
            lr, out = config.optimizer.lr * rate, folder / f"{kind}-{seed}-{rate}"
            seconds = peer(python, kind, lr, seed, config, model, out)
            rows.append({"trainer": f"TRL {kind.upper()}", "lr": lr, "seconds": seconds,
                         **accuracy(run, genscale.load(out).networks["gpt"])})
            print(json.dumps(rows[-1]), flush=True)
    return {"seed": seed, "before": accuracy(run, run.networks["reference"]), "rows": rows}


def peer(python: str, kind: str, lr: float, seed: int, config: genscale.Config, model: Path, out: Path) -> dict[str, float]:
    """Its run, in an environment of its own; the seconds that it says it took."""
    prompts = model.parent / "prompts.jsonl"
    made_prompts(prompts)
    flags = {"model": model, "prompts": prompts, "out": out, "kind": kind, "steps": config.train.steps,
             "batch": config.train.global_batch_size, "group": config.objective.group, "tokens": config.objective.tokens,
             "seed": seed, "warmup": config.schedule.warmup_steps, "lr": lr, "beta": config.objective.beta,
             "final_share": config.schedule.final_share}
    command = [python, str(ROOT / "benchmarks/peers/trl_sums.py"), *(word for name, value in flags.items()
                                                                    for word in (f"--{name}", str(value)))]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
                          text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def made_prompts(path: Path) -> None:
    """What ours trains on, each sum once."""
    from genscale.data.made_sums import sums

    columns = sums(held_out=False).columns
    pairs = dict(zip(columns["prompt"], columns["answer"], strict=True))
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs.items()))


def versions(python: str) -> dict[str, str]:
    """Of the packages that the peer has."""
    program = ("import importlib.metadata as m, json; "
               "print(json.dumps({n: m.version(n) for n in ('trl', 'transformers', 'torch')}))")
    return json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment that has TRL")
    parser.add_argument("--kinds", default="rloo,grpo", help="of TRL's trainers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of the config's")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = circumstances(["torch"]) | {"threads": 1, "versions_of_the_peer": versions(arguments.python)}
    with tempfile.TemporaryDirectory(prefix="reward-trl-") as folder:
        kinds = arguments.kinds.split(",")
        result |= compare(arguments.seed, arguments.steps, kinds, arguments.python, Path(folder))
    write(result, arguments.out)


if __name__ == "__main__":
    main()
