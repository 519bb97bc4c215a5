"""The plan of each shipped config at the size it is meant for: memory, time and cost, without a GPU.

    python benchmarks/plan_configs.py [--only gpt/llama-8b,vae/emoji64] [--out benchmarks/results/plan-configs.json]

Prints the table that docs/how-to/plan.md has, and writes the same as JSON. Each config is planned in a process of its own,
whose largest memory and time stand beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.as_json import as_dict
from genscale.planning.plan import plan
from genscale.planning.profiles import profile
from genscale.settings.parser import parse_config
from report import ROOT, circumstances

OUT = ROOT / "benchmarks" / "results" / "plan-configs.json"
SIZES: dict[str, tuple[int, str]] = {
    "gpt/gpt2-124m": (8, "a100"), "gpt/gpt2-355m": (8, "a100"), "gpt/gpt2-774m": (16, "a100"), "gpt/gpt2-1558m": (32, "a100"),
    "gpt/gpt3-125m": (8, "a100"), "gpt/gpt3-350m": (16, "a100"), "gpt/gpt3-760m": (32, "a100"), "gpt/gpt3-1.3b": (32, "h100"),
    "gpt/gpt3-2.7b": (64, "h100"), "gpt/gpt3-6.7b": (128, "h100"), "gpt/gpt3-13b": (256, "h100"),
    "gpt/gpt3-175b": (800, "h100"),
    "gpt/llama-1b": (64, "h100"), "gpt/llama-8b": (64, "h100"), "gpt/llama-70b": (1024, "h100"),
    "gpt/shakespeare-char": (1, "a100"), "gpt/text-file": (1, "rtx-4090"),
    "dcgan/dcgan-64": (1, "rtx-4090"), "dcgan/dcgan-256-large": (8, "a100"), "dcgan/clipart-128": (1, "rtx-4090"),
    "dcgan/wgan-gp-mnist-32": (1, "rtx-4090"), "vae/emoji64": (1, "rtx-4090"), "vae/mnist-32": (1, "rtx-4090"),
    "vae/binarised-mnist-iwae50": (1, "rtx-4090"), "vae_gan/digits": (1, "rtx-4090"), "points/ring": (1, "rtx-4090"),
}  # fmt: skip
"""GPUs and their kind."""


def planned(name: str, gpus: int, gpu: str) -> dict[str, Any]:
    """The plan of one config, or why there is none; made in a process of its own, to see what that takes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as answer:
                json.dump(_planned(name, gpus, gpu), answer)
        finally:  # what is wrong shows as no answer
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        made = json.loads(answer.read() or '{"refused": "the planner failed"}')
    _, _, usage = os.wait4(child, 0)
    made["planning"] = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}
    return made


def _planned(name: str, gpus: int, gpu: str) -> dict[str, Any]:
    try:
        machine = Machine(gpu, gpus, min(gpus, profile(gpu).gpus_per_node))
        return as_dict(plan(parse_config(FAMILIES, ["--config", name]), machine))
    except UserError as error:
        return {"refused": str(error)}


def row(name: str, gpus: int, gpu: str, made: dict[str, Any]) -> str:
    """A line of the table."""
    if "refused" in made:
        return f"| `{name}` | {gpus} x {gpu} | {made['refused']} | | | | | |"
    memory, settings, speed = made["memory"], made["settings"], made["time"]
    unit = next(key for key in speed if key.endswith("_per_second"))
    mfu = "" if speed["mfu"] is None else f"{speed['mfu']:.0%}"
    hours = made["whole"]["seconds"] / 3600
    length = f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    how = f"{settings['strategy']}, micro-batch {settings['micro_batch_size']}"
    sizes = [memory["peak"] / 2**30, memory["expected_error"] / 2**30, made["machine"]["memory"] / 2**30]
    return (f"| `{name}` | {gpus} x {gpu} | {how} | {made['verdict']} | {sizes[0]:.1f} +- {sizes[1]:.1f} of {sizes[2]:.1f} | "
            f"{speed[unit]:,.0f} {unit.partition('_')[0]} | {mfu} | {length}, {made['whole']['gpu_hours']:,.1f} GPU h |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SIZES), help="Configs, by name.")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    found, about = dict[str, Any](), circumstances(["torch"])
    print("| config | on | as the config says | verdict | GiB a GPU | a second | MFU | in all |")
    print("|---|---|---|---|---|---|---|---|")
    for name in asked.only.split(","):
        found[name] = planned(name, *SIZES[name])
        print(row(name, *SIZES[name], found[name]), flush=True)
        asked.out.write_text(json.dumps({**about, "plans": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
