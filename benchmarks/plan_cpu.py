"""A calibrated CPU: the ratios of the step times of several shapes, told by `genscale plan` and measured in turns.

    OMP_NUM_THREADS=1 python benchmarks/plan_cpu.py --out benchmarks/results/plan-cpu.json

The machine is measured at the sizes of the first shape alone (`genscale plan --calibrate`); the others are told from it. Steps
are those of `genscale train`, taken in turns, so that whatever else the machine does falls on all of them alike; judged are the
seconds that the processor gave them, and those of the clock stand beside.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from genscale.families import FAMILIES
from genscale.parallel.processes import Processes
from genscale.planning.account import Machine, PlannedStep
from genscale.planning.calibrate import calibrate
from genscale.planning.profiles import GpuProfile, as_dict
from genscale.planning.time import time_of
from genscale.planning.trace import plan_step
from genscale.settings.config import Config
from genscale.settings.parser import parse_config
from our_step import OurSteps
from report import ROOT, circumstances, write
from turns import take_turns

MACHINE = Machine("cpu", 1, 1)
SHAPES = {  # layers, heads, width, time, batch, micro-batch
    "4 x 128, 8 texts of 128": (4, 4, 128, 128, 8, 8),
    "2 x 128": (2, 4, 128, 128, 8, 8),
    "8 x 128": (8, 4, 128, 128, 8, 8),
    "4 x 256": (4, 4, 256, 128, 8, 8),
    "4 x 64": (4, 4, 64, 128, 8, 8),
    "texts of 256": (4, 4, 128, 256, 8, 8),
    "2 texts": (4, 4, 128, 128, 2, 2),
    "accumulation 4": (4, 4, 128, 128, 8, 2),
}
TOLERATED = 0.2


def config_of(shape: tuple[int, ...], text: Path) -> Config:
    layers, heads, width, time, batch, micro = shape
    return parse_config(FAMILIES, [
        "--model.family=gpt", f"--model.layers={layers}", f"--model.heads={heads}", f"--model.width={width}",
        f"--model.positions={time}", f"--data.source={text}", "--data.tokenizer=bytes",
        f"--data.sequence_length={time}", "--data.validation_blocks=2", f"--train.global_batch_size={batch}",
        f"--train.micro_batch_size={micro}", "--train.precision=fp32", f"--run.dir={text.parent}", "--run.name=plan-cpu"])


def told(step: PlannedStep, machine: GpuProfile) -> dict[str, Any]:
    time = time_of(step, MACHINE, machine, "fp32", compiled=False)
    return {"seconds": time.step, "parts": {part.category: round(part.seconds, 5) for part in time.parts}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text((ROOT / "README.md").read_text() * 20)
        configs = {name: config_of(shape, text) for name, shape in SHAPES.items()}
        steps = {name: plan_step(config, MACHINE) for name, config in configs.items()}
        first = next(iter(steps))
        runs = {name: OurSteps(config) for name, config in configs.items()}
        machine = calibrate(Processes(), ["here"], Path(folder), "fp32", steps[first], seconds=20)
        turns = take_turns(dict(runs), asked.rounds, warmup=3)
        again = calibrate(Processes(), ["here"], Path(folder), "fp32", steps[first], seconds=20)
        for run in runs.values():
            run.loader.close()
    clock = {name: statistics.median(turn.seconds for turn in those) for name, those in turns.items()}
    seconds = {name: statistics.median(turn.cpu_seconds for turn in those) for name, those in turns.items()}
    found = {name: told(step, machine) for name, step in steps.items()}
    ratios = {name: {"measured": round(seconds[name] / seconds[first], 4), "by_the_clock": round(clock[name] / clock[first], 4),
                     "told": round(found[name]["seconds"] / found[first]["seconds"], 4)} for name in SHAPES if name != first}
    for each in ratios.values():
        each["error"] = round(each["told"] / each["measured"] - 1, 4)
    for name, each in ratios.items():
        print(f"{name:26} measured {each['measured']:7.3f}  told {each['told']:7.3f}  {each['error']:+7.1%}")
    worst = max(abs(each["error"]) for each in ratios.values())
    absolute = {name: round(found[name]["seconds"] / seconds[name] - 1, 4) for name in SHAPES}
    write({**circumstances(["torch"]), "rounds": asked.rounds, "median_cpu_seconds": seconds, "median_step_seconds": clock,
           "told": found, "ratios": ratios,
           "worst": worst, "within_20": worst <= TOLERATED, "errors_of_seconds": absolute,
           "profile": as_dict(replace(machine, source="measured")), "profile_again": as_dict(again)}, asked.out)


if __name__ == "__main__":
    main()
