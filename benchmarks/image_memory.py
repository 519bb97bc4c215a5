"""Peak memory and time of a training step of the residual 128-pixel pair, with each kind of activation checkpointing.

    python benchmarks/image_memory.py --out benchmarks/results/image-memory-cpu.json

The networks and losses are those of configs/dcgan/clipart-128.yaml (52 million parameters), on any folder of images (default:
the digits, enlarged). Each kind runs in a process of its own; the peak is measured as in memory.py, over the second step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from genscale.objectives import FAMILIES
from genscale.settings.parser import load_config
from memory import GIB, ROOT, Gauge
from our_step import OurSteps
from report import circumstances, write

import torch

KINDS = ("none", "selective", "full")


def measure(kind: str, arguments: argparse.Namespace) -> None:
    """Two steps; prints the peak and the seconds of the second."""
    torch.set_num_threads(arguments.threads)
    overrides = ["--data.source", arguments.source, "--data.size", str(arguments.size), "--data.validation_images", "100",
                 "--parallel.activation_checkpointing", kind, "--train.global_batch_size", str(arguments.batch),
                 "--train.precision", arguments.precision]
    config = load_config(FAMILIES, ROOT / "configs/dcgan/clipart-128.yaml", overrides)
    gauge = Gauge(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    steps = OurSteps(config)
    steps()
    gauge.reset()
    seconds = steps().seconds
    print(f"PEAK {gauge.peak()} {seconds} {steps.parameters}", flush=True)
    steps.close()


def run(kind: str) -> dict[str, float]:
    # What is freed goes back to the system at once, or the resident set would show what was needed earlier.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, *sys.argv, "--kind", kind], env=environment, capture_output=True, text=True,
                          timeout=1800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if done.returncode or not lines:
        raise SystemExit(f"{kind} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    _, peak, seconds, parameters = lines[0].split()
    result = {"peak_gib": round(int(peak) / GIB, 3), "step_seconds": round(float(seconds), 2), "parameters": int(parameters)}
    print(kind, result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="digits", help="data.source")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--kind", help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    if arguments.kind:
        measure(arguments.kind, arguments)
        return
    settings = {key: getattr(arguments, key) for key in ("source", "size", "batch", "precision", "threads")}
    write({**circumstances(["torch", "accelerate"]), **settings, "results": {kind: run(kind) for kind in KINDS}}, arguments.out)


if __name__ == "__main__":
    main()
