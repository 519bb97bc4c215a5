"""GPT-2 on one GPU, ours against transformers.Trainer in the same session: tokens/s, MFU, TFLOP/s, peak memory, data wait.

    python benchmarks/gpt_gpu.py --out benchmarks/results/gpt-gpu.json --profile benchmarks/results/gpt-gpu-profile.txt

Needs neither deepspeed, datasets nor wandb, unless --only asks for a ZeRO case. Both sides train in bf16 with torch.compile and
fused AdamW on the same blocks, in processes of their own (so that neither's memory stands in the other's way), taking turns:
ours, theirs, ours, theirs; the medians of all their steps are compared. Our steps are those of `genscale train` (our_step.py),
theirs those of peers/transformers_trainer.py. MFU is the model's FLOPs (GPT.flops_per_token, equal to torch's FlopCounterMode)
over the device's dense peak.
--device cpu --layers 2 --width 64 --time 64 tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genscale.data.text.data import TextDataSettings
from genscale.families.gpt.network import GPT, GPTSettings, resolved
from genscale.interop.architectures import config_json
from genscale.interop.weights import write_weights
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings, ScheduleSettings, TrainSettings
from genscale.tracking.peaks import device_name, peak_flops
from our_step import OurSteps, first_batches
from report import ROOT, circumstances, write

import torch
from torch import Tensor

MODELS = {"124m": {"layers": 12, "heads": 12, "width": 768, "batch": 32},
          "1558m": {"layers": 48, "heads": 25, "width": 1600, "batch": 8}}
VOCAB_SIZE, TIME = 50304, 1024
# Name of a case: model, side, precision, strategy.
CASES = {
    "124m": ("124m", "genscale", "bf16", "single"), "124m-transformers": ("124m", "transformers", "bf16", "single"),
    "1558m": ("1558m", "genscale", "bf16", "single"), "1558m-transformers": ("1558m", "transformers", "bf16", "single"),
    "1558m-fp8": ("1558m", "genscale", "fp8", "single"), "1558m-fsdp2": ("1558m", "genscale", "bf16", "fsdp2"),
    "124m-zero2": ("124m", "genscale", "bf16", "zero2"), "124m-zero3": ("124m", "genscale", "bf16", "zero3"),
}
DEFAULT_CASES = "124m,124m-transformers,1558m,1558m-transformers,1558m-fp8,1558m-fsdp2"
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "deepspeed")
WARMUP_STEPS = 10
"""The first steps compile and find their memory."""


def config_of(case: str, arguments: argparse.Namespace) -> Config:
    model, _, precision, strategy = CASES[case]
    shape = MODELS[model]
    layers, width = arguments.layers or shape["layers"], arguments.width or shape["width"]
    heads = shape["heads"] if not arguments.width else 2
    batch, time = arguments.batch or shape["batch"], arguments.time
    return Config(model=GPTSettings(layers=layers, heads=heads, width=width, positions=time, vocab_size=VOCAB_SIZE),
                  data=TextDataSettings(sequence_length=time),
                  train=TrainSettings(steps=10**6, global_batch_size=batch, precision=precision),
                  optimizer=OptimizerSettings(lr=1e-4), schedule=ScheduleSettings(name="constant"),
                  parallel=ParallelSettings(strategy=strategy, compile=arguments.device == "cuda"))


def huggingface_twin(config: Config, vocab_size: int, read: Callable[[str], Tensor]) -> Any:
    """GPT2LMHeadModel with the given weights of ours."""
    from transformers import AutoModelForCausalLM

    settings = resolved(config.model)
    with tempfile.TemporaryDirectory() as folder:
        content = config_json(settings, vocab_size, "float32", end_of_text=0)
        Path(folder, "config.json").write_text(json.dumps(content))
        write_weights("gpt2", settings, vocab_size, read, torch.float32, Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def our_figures(config: Config, steps: int, profile: Path | None) -> dict[str, Any]:
    ours = OurSteps(config)
    seconds, waits = [], []
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS and torch.cuda.is_available():
            torch.cuda.synchronize()
        report = ours()
        if step >= WARMUP_STEPS:
            seconds.append(report.seconds)
            waits.append(report.data_wait_seconds)
    if profile is not None:
        _write_profile(ours, profile)
    ours.close()
    return {"seconds": seconds, "data_wait_share": sum(waits) / sum(seconds), "precision": ours.precision}


def _write_profile(ours: OurSteps, file: Path) -> None:
    """The table of torch's profiler over three steps, by time on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            ours()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    file.write_text(profiler.key_averages().table(sort_by=order, row_limit=40))


def their_figures(config: Config, steps: int) -> dict[str, Any]:
    with torch.device("meta"):
        network = GPT(config.model, VOCAB_SIZE)
    model = huggingface_twin(config, VOCAB_SIZE, lambda name: network.initial_weight(name, config.run.seed))
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from transformers_trainer import train

    seconds: list[float] = []
    count = WARMUP_STEPS + steps
    batch = config.train.global_batch_size
    # Labels are the inputs: their model shifts them itself, so it has one target fewer a row than ours.
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for tokens in first_batches(config, count) for row in tokens]
    train(model, rows, count, batch=batch, micro=batch, precision="bf16", after_step=seconds.append,
          torch_compile=config.parallel.compile, train_sampling_strategy="sequential")
    return {"seconds": seconds[WARMUP_STEPS:]}


def run_case(case: str, arguments: argparse.Namespace) -> None:
    """In a process of its own: measure one case and print it as JSON."""
    config = config_of(case, arguments)
    side = CASES[case][1]
    profile = arguments.profile if case == arguments.profiled else None
    measured = our_figures(config, arguments.steps, profile) if side == "genscale" else their_figures(config, arguments.steps)
    if torch.cuda.is_available():
        measured["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("RESULT " + json.dumps(measured))


def collect(case: str, turns: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """A case's figures from all of its turns."""
    config = config_of(case, arguments)
    with torch.device("meta"):
        network = GPT(config.model, VOCAB_SIZE)
    device = torch.device(arguments.device)
    seconds = statistics.median([second for turn in turns for second in turn["seconds"]])
    tokens = config.train.global_batch_size * config.data.sequence_length / seconds
    flops = network.flops_per_token(config.data.sequence_length) * tokens
    peak = peak_flops(device_name(device), CASES[case][2])
    result = {"parameters": network.parameter_count(), "micro_batch": config.train.global_batch_size,
              "sequence_length": config.data.sequence_length, "precision": CASES[case][2], "strategy": CASES[case][3],
              "median_step_seconds": seconds, "tokens_per_second": tokens, "tflops_per_second": flops / 1e12,
              "mfu": flops / peak if peak else None, "turns": [statistics.median(turn["seconds"]) for turn in turns]}
    for key in ("peak_memory_gib", "data_wait_share"):
        if key in turns[0]:
            result[key] = max(turn[key] for turn in turns)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=DEFAULT_CASES, help=f"cases, as in 124m,1558m-fp8; of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=40, help="measured steps in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--profile", type=Path, help="file for the profiler's table of the first of our cases")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    for name in ("layers", "width", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's own")
    parser.add_argument("--time", type=int, default=TIME)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--profiled", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case, arguments)
        return
    cases = arguments.only.split(",")
    profiled = next((case for case in cases if CASES[case][1] == "genscale"), "")
    turns: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for turn in range(arguments.turns):
        for case in cases:
            command = [sys.executable, *sys.argv, "--case", case, "--profiled", profiled if turn == 0 else ""]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:  # the others still count
                print(f"turn {turn + 1}: {case} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            turns[case].append(json.loads(lines[0].removeprefix("RESULT ")))
            median = statistics.median(turns[case][-1]["seconds"])
            print(f"turn {turn + 1}: {case} {median:.4f} s a step", file=sys.stderr, flush=True)
            done_cases = {case: collect(case, turns[case], arguments) for case in cases if turns[case]}
            write(circumstances(PACKAGES) | {"cases": done_cases}, arguments.out)


if __name__ == "__main__":
    main()
