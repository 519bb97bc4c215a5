"""Modes found and share of points of high quality on the ring and the grid of Gaussians, over seeds.

    python benchmarks/points_cpu.py --out benchmarks/results/points-cpu.json

Runs configs/points/*.yaml as `genscale train` does. Protocol of PacGAN (Lin et al. 2018, section 4.1): 2,500 points; a point is
of high quality within three standard deviations of a mode, and one such point finds a mode. Published there: GAN 6.3 of 8 and
17.3 of 25 modes; PacGAN2 7.9 and 23.8.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from genscale.objectives import FAMILIES
from genscale.settings.parser import load_config
from genscale.training.run import train
from report import ROOT, circumstances, write

import torch

GOOD = 0.95


def measure(source: str, seeds: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    runs = []
    for seed in range(1, seeds + 1):
        settings = ["--run.seed", str(seed), "--run.dir", str(folder), "--run.name", f"{source}-{seed}",
                    "--tracking.wandb", "disabled", *overrides]
        started = time.process_time()
        metrics = train(load_config(FAMILIES, ROOT / f"configs/points/{source}.yaml", settings)).metrics
        runs.append({"seed": seed, "modes": int(metrics["modes"]), "high_quality": metrics["high_quality"],
                     "cpu_seconds": round(time.process_time() - started, 1)})
        print(source, runs[-1], flush=True)
    modes = {"ring": 8, "grid": 25}[source]
    return {"runs": runs, "modes_mean": statistics.mean(run["modes"] for run in runs),
            "high_quality_mean": statistics.mean(run["high_quality"] for run in runs),
            "seeds_with_all_modes": sum(run["modes"] == modes for run in runs),
            f"seeds_with_all_modes_and_{GOOD}_high_quality":
                sum(run["modes"] == modes and run["high_quality"] >= GOOD for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sources", default="ring,grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments, overrides = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    about = circumstances(["torch"]) | {"threads": arguments.threads}
    with tempfile.TemporaryDirectory() as folder:
        results = {source: measure(source, arguments.seeds, overrides, Path(folder)) for source in arguments.sources.split(",")}
    total = sum(run["cpu_seconds"] for result in results.values() for run in result["runs"])
    write({**about, "cpu_seconds": round(total, 1), "results": results}, arguments.out)


if __name__ == "__main__":
    main()
