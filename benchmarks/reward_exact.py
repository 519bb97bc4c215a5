"""How near policies come to the best possible one, which is known exactly: 364 texts, 4 prompts (reward_space.py), over seeds.

    python benchmarks/reward_exact.py --out benchmarks/results/reward-exact-cpu.json

Total variation to p*(y) ~ p_ref(y) exp(r(y) / beta), and the gap in nats that bounds it, total variation <= sqrt(gap / 2).

- tabular: genscale's own loss, with a policy without limits (reward_tabular.py).
- variants: the same at 800 steps of 32 texts a prompt, beside what papers and programs do instead.
- gpt: two layers, by `genscale.train` with a reward given in Python (reward_gpt.py); a minute or two a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from report import circumstances, write
from reward_gpt import SETTINGS
from reward_gpt import measure as measure_gpt
from reward_space import BETA, TEXTS, total_variation
from reward_tabular import GENSCALE, VARIANTS, Tables, measure

import torch

TABULAR = {"steps": 2000, "texts": 64}
VARIANT = {"steps": 800, "texts": 32}


def tabular(seeds: int) -> dict[str, Any]:
    row = measure(GENSCALE, seeds, **TABULAR)
    return {**TABULAR, "limit": 0.02, "met": max(row["total_variation"]) <= 0.02 and bounded(row), **row}


def variants(seeds: int) -> dict[str, Any]:
    tables = Tables(seeds)
    start = total_variation(tables.log_reference, tables.optimum).mean().item()
    rows = [said(measure(name, seeds, **VARIANT)) for name in VARIANTS]
    return {**VARIANT, "total_variation_of_the_reference": round(start, 4), "rows": rows}


def gpt(seeds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="reward-exact-") as folder:
        rows = [said(measure_gpt(seed, Path(folder), {})) for seed in range(1, seeds + 1)]
    limits = {"total_variation": 0.05, "seconds": 180}
    met = all(row[name] <= most for row in rows for name, most in limits.items()) and all(map(bounded, rows))
    return {"settings": SETTINGS, "threads": torch.get_num_threads(), "limits": limits, "met": met, "rows": rows}


def bounded(row: dict[str, Any]) -> bool:
    """Whether both gaps say of each seed that it is at least as far as it is."""
    distances, *gaps = (row[name] if isinstance(row[name], list) else [row[name]]
                        for name in ("total_variation", "gap", "estimated_gap"))
    return all(distance <= math.sqrt(max(gap, 0) / 2) for each in gaps for distance, gap in zip(distances, each, strict=True))


def said(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parts = {"tabular": tabular, "variants": variants, "gpt": gpt}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(parts), help=f"which of {', '.join(parts)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, help="JSON file to write; parts not run now are kept from what it held")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    now = circumstances(["torch"])
    kept = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    result = {**now, "config": {"texts": len(TEXTS), "beta": BETA}, "parts": kept.get("parts", {})}
    for name in arguments.parts.split(","):
        about = {"commit": now["commit"], "command": now["command"], "seeds": arguments.seeds}
        result["parts"][name] = {**about, **parts[name](arguments.seeds)}
    write(result, arguments.out)


if __name__ == "__main__":
    main()
