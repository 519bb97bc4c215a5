"""What a rollout costs where the policy is sharded: 128 tokens under FSDP2 and ZeRO-3 against DDP, on two processes, in turns.

    python benchmarks/reward_rollout.py --out benchmarks/results/reward-rollout-cpu.json      # two quiet cores, two minutes

Each contestant is a run of the family `reward` in two processes of its own that, instead of a step, writes answers that never
end, again and again: the policy is gathered, writes, and is given back, as in every micro-batch. DDP runs twice (`control`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import genscale
from contestants import Program, race
from report import ROOT, circumstances, write
from turns import compared

import torch

TOKENS, LIMIT = 128, 1.5
SETTINGS: dict[str, Any] = {
    "model.from": "scratch", "model.preset": "llama", "model.layers": 4, "model.heads": 4, "model.width": 256,
    "model.positions": 160, "data.source": "sums", "data.prompt_tokens": 8, "data.row_bytes": 64, "objective.tokens": TOKENS,
    "objective.group": 8, "objective.rewards": [{"name": "length", "target": 5}], "train.global_batch_size": 4,
    "train.precision": "fp32", "guards.dry_batch": False, "guards.hang_minutes": 0, "tracking.wandb": "disabled",
}  # fmt: skip
PROGRAMS = {"fsdp2": "fsdp2", "zero3": "zero3", "ddp": "ddp", "control": "ddp"}


def write_for_ever(strategy: str, folder: str) -> None:
    """A process of a contestant."""
    from genscale.families.reward.objective import RewardTuning
    from genscale.families.reward.rollout import Prompts

    def loss(self: RewardTuning, networks: Any, batch: Any, draws: Any) -> NoReturn:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # its steps are what the gate sees
        prompts = Prompts.of(batch["prompt"])
        uniforms = draws.uniform("token", self.settings.group, TOKENS).flatten(0, 1)
        while True:
            with self.generating("policy") as rollout:
                answers = self.writer.write(rollout, prompts, uniforms, self.settings.group, never_end=True)
            assert answers.mask.all() and answers.tokens.shape == (len(uniforms), TOKENS)
            optimizer.step()

    RewardTuning.loss = loss  # type: ignore[method-assign]
    place = {"run.dir": folder, "run.name": "rollouts", "parallel.strategy": strategy}
    genscale.train(genscale.config("reward", {**SETTINGS, **place}))


def program(strategy: str) -> Program:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return Program([sys.executable, *launcher, __file__, "--worker", strategy, "{scratch}/runs"], ROOT, [ROOT], 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of all turns together; there are five rounds at least")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.worker:
        write_for_ever(*arguments.worker)
        return
    result = circumstances(["torch", "accelerate", "deepspeed"]) | {"config": SETTINGS, "limit": LIMIT, "strategies": {}}
    with tempfile.TemporaryDirectory(prefix="reward-rollout-") as scratch:
        programs = {name: program(strategy) for name, strategy in PROGRAMS.items()}
        turns, about = race(programs, Path(scratch), arguments.seconds)
    about.pop("parameters")  # of what stands for an optimizer
    result |= about
    for name in ("fsdp2", "zero3"):
        result["strategies"][name] = compared({each: turns[each] for each in (name, "ddp", "control")})
    result["met"] = all(each["ratio_of_medians"] <= LIMIT for each in result["strategies"].values())
    write(result, arguments.out)


if __name__ == "__main__":
    main()
