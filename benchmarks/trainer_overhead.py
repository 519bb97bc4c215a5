"""What the trainer costs: one step of ours against a bare PyTorch loop over the same model and data, taking turns.

    python benchmarks/trainer_overhead.py --out benchmarks/results/trainer-overhead-cpu.json

Ours is the real thing (our_step.py): StepLoader (reading, packing, the ledger), LanguageModel, ReplicatedEngine, Trainer. The
bare loop has its batches ready and does nothing but forward, backward, clip, step. Both start from the same weights and see the
same batches, so their losses must agree: that is checked. They alternate step by step in one process, so that whatever else the
machine does falls on both, and the bare loop does so twice (`control`). Wall time is what counts; the step's CPU time is shown
beside because a busy machine leaves it alone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genscale.data.text.data import TextDataSettings
from genscale.families import family
from genscale.families.gpt.network import GPTSettings
from genscale.parallel.materialise import fill, materialise
from genscale.settings.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.training.optimizers import make_optimizer
from our_step import OurSteps, first_batches
from report import circumstances, write
from turns import compared, take_turns

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"tiny": {"layers": 2, "heads": 2, "width": 64, "time": 64, "batch": 4, "steps": 400},
         "small": {"layers": 6, "heads": 6, "width": 384, "time": 256, "batch": 4, "steps": 30}}
WARMUP_STEPS = 5
Step = Callable[[], float]  # returns the loss


def config_of(size: dict[str, int]) -> Config:
    model = GPTSettings(layers=size["layers"], heads=size["heads"], width=size["width"], positions=size["time"])
    return Config(model=model, data=TextDataSettings(sequence_length=size["time"]),
                  train=TrainSettings(steps=10**6, global_batch_size=size["batch"], precision="fp32"),
                  optimizer=OptimizerSettings(lr=1e-4), schedule=ScheduleSettings(name="constant"))


def bare_step(config: Config, network: nn.Module, batches: list[Tensor]) -> Step:
    """A call for one step of the loop that a person would write for this model alone."""
    optimizer = make_optimizer(network, config.optimizer)
    network.train()
    ready = iter(batches)

    def step() -> float:
        tokens = next(ready)
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(size: dict[str, int]) -> dict[str, Any]:
    config, count = config_of(size), WARMUP_STEPS + size["steps"]
    ours = OurSteps(config)
    batches = first_batches(config, count)
    losses: dict[str, list[float]] = {"genscale": [], "bare": [], "control": []}
    bare = {}
    for name in ("bare", "control"):
        network = copy.deepcopy(family("gpt").build_objective(config, ours.data).networks["gpt"])
        materialise(network, torch.device("cpu"))
        fill(network, ours.objective.initial_weights("gpt"))
        bare[name] = bare_step(config, network, batches)
    steps = {"genscale": lambda: losses["genscale"].append(ours().metrics["loss"]),
             "bare": lambda: losses["bare"].append(bare["bare"]()),
             "control": lambda: losses["control"].append(bare["control"]())}
    turns = take_turns(steps, size["steps"], WARMUP_STEPS)
    ours.close()
    difference = max(abs(a - b) / b for a, b in zip(losses["genscale"][:WARMUP_STEPS], losses["bare"], strict=False))
    if difference > 1e-5:
        raise SystemExit(f"the two loops do not train alike: their losses differ by {difference:.1e}")
    return {**size, "parameters": ours.parameters, "largest_relative_difference_of_losses": difference, **compared(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"which of {', '.join(SIZES)}")
    parser.add_argument("--steps", type=int, help="instead of each size's own")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = circumstances(["torch"]) | {"threads": arguments.threads, "results": {}}
    for name in arguments.sizes.split(","):
        size = SIZES[name] | ({"steps": arguments.steps} if arguments.steps else {})
        result["results"][name] = measure(size)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
