"""Our training step against transformers.Trainer with GPT2LMHeadModel: same shapes, data and machine, taking turns.

    python benchmarks/gpt_cpu.py --out benchmarks/results/gpt-cpu.json

Both sides are the real thing (gpt_step.py): ours is what `genscale train` does in a step, theirs is
`transformers.Trainer.train()` with its own data loader, clipping and fused AdamW. Dropout is off on both sides. The two
alternate step by step in one process (ours runs in a callback between two of theirs), so that whatever else the machine does
falls on both. Their losses must fall alike, for both start from the same weights and see the same blocks.

Compared: the same precision on both sides (fp32, bf16), and each side's default (ours: bf16 where the CPU computes in it,
theirs: fp32). Shapes: a GPT of 6 layers x 384 with GPT-2's vocabulary, and nanoGPT's published setting for a CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from gpt_step import blocks_of, huggingface_twin, train_with_transformers
from our_step import OurSteps
from report import circumstances, write

from genscale.config import Config, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.data.text import TextDataSettings
from genscale.models.gpt import GPTSettings

SIZES = {
    "gpt": {"layers": 6, "heads": 6, "width": 384, "time": 256, "batch": 4, "vocab_size": 50304, "steps": 20},
    # Its 65 characters are 320 rows here: bytes, and padding.
    "nanogpt-cpu": {"layers": 4, "heads": 4, "width": 128, "time": 64, "batch": 12, "vocab_size": 320, "steps": 200},
}
WARMUP_STEPS = 3
PRECISIONS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "default": ("auto", "fp32")}  # ours, theirs


def config_of(size: dict[str, int], precision: str) -> Config:
    model = GPTSettings(layers=size["layers"], heads=size["heads"], width=size["width"], positions=size["time"],
                        vocab_size=size["vocab_size"])
    return Config(model=model, data=TextDataSettings(sequence_length=size["time"]),
                  train=TrainSettings(steps=10**6, global_batch_size=size["batch"], precision=precision),
                  optimizer=OptimizerSettings(lr=1e-4), schedule=ScheduleSettings(name="constant"))


def compare(size: dict[str, int], precisions: tuple[str, str]) -> dict[str, Any]:
    config = config_of(size, precisions[0])
    count = WARMUP_STEPS + size["steps"]
    ours = OurSteps(config)
    twin = huggingface_twin(config, size["vocab_size"], ours.objective.initial_weights("gpt"))
    seconds: dict[str, list[float]] = {"genscale": [], "transformers": []}
    our_losses: list[float] = []

    def take_turns(theirs: float) -> None:
        report = ours()
        seconds["transformers"].append(theirs)
        seconds["genscale"].append(report.seconds)
        our_losses.append(report.metrics["loss"])

    rows = blocks_of(config, count * size["batch"])
    their_loss = train_with_transformers(config, twin, rows, count, precisions[1], take_turns)
    ours.close()
    AcceleratorState._reset_state(reset_partial_state=True)  # a singleton: the next comparison has another precision
    # They divide the sum over time - 1 targets of a row by its time labels.
    their_loss *= size["time"] / (size["time"] - 1)
    difference = abs(statistics.mean(our_losses) - their_loss) / their_loss
    if difference > 0.01:
        raise SystemExit(f"the two do not train alike: their mean losses differ by {difference:.1%}")
    kept = {name: values[WARMUP_STEPS:] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in kept.items()}
    ratios = [a / b for a, b in zip(kept["genscale"], kept["transformers"], strict=True)]
    return {**size, "parameters": ours.parameters, "precision": {"genscale": ours.precision, "transformers": precisions[1]},
            "median_step_seconds": medians, "ratio_of_medians": medians["genscale"] / medians["transformers"],
            "quartiles_of_ratios": statistics.quantiles(ratios, n=4), "relative_difference_of_mean_losses": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default=",".join(f"{size}/{precision}" for size in SIZES for precision in PRECISIONS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = circumstances(["torch", "transformers", "accelerate"]) | {"threads": arguments.threads, "comparisons": {}}
    for name in arguments.only.split(","):
        size, precision = name.split("/")
        result["comparisons"][name] = compare(SIZES[size], PRECISIONS[precision])
    write(result, arguments.out)


if __name__ == "__main__":
    main()
