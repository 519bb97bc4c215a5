"""How near a policy over pictures comes to the best one there is, which is known: latents of vae/digits and dcgan/digits that
make threes, and a Bernoulli decoder whose pixels are paid for.

    python benchmarks/reward_images.py --out benchmarks/results/reward-images-cpu.json

The latent policies are those of configs/reward/digits-threes.yaml, of the vae run with four times the pictures a step and in
more steps, for what is wanted has a ragged edge among its latents, of the dcgan run in fewer. With reward 1 for a three
and else 0, and a share p of threes in the prior's pictures, the best policy has Z = 1 - p + p exp(1 / beta), and a share
p exp(1 / beta) / Z; p is counted in pictures that no training has seen. The gap is log Z - (share / beta - KL), in nats. The
decoder's reward is a sum over pixels, so that the best logits are the reference's plus weight / beta, exactly.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import genscale
from genscale.rewards.registry import REWARDS
from report import circumstances, write

import torch
from torch import Tensor

FRESH = 1_000_000
"""Sample numbers from here on are of no training and no validation."""
BETA_OF_PIXELS = 0.25
BERNOULLI = {"model.architecture": "mlp", "model.multipliers": None, "model.width": 64, "model.latents": 8,
             "model.hidden_width": 128, "model.likelihood": "bernoulli", "model.scale": "shared", "model.scale_value": 0.1,
             "objective.binarise": "dynamic", "data.size": 8, "train.steps": 1200}
"""What the VAE whose decoder is trained has otherwise than vae/digits."""
SIZES = {"vae": (800, 64), "dcgan": (300, 16)}
"""Steps, and groups of 32 pictures in each. The config has 600 and 16."""
EMA_STEPS = 25
AIMS = {"gap": 0.2, "share_off": 0.08, "pixel_tv": 0.005}


class LeftHalf(genscale.ImageReward):
    """An eighth of the lit pixels of the left half minus those of the right."""

    def judge(self, images: Tensor) -> Tensor:
        left, right = images.flatten(1, 2).chunk(2, -1)
        return (left.flatten(1).sum(1) - right.flatten(1).sum(1)) / 8


def train(config: str, folder: Path, name: str, settings: dict[str, Any], **given: Any) -> tuple[Any, float]:
    """A run, and the seconds of processor time that it took."""
    settings = {**settings, "run.dir": str(folder), "run.name": name, "tracking.wandb": "disabled"}
    began = time.process_time()
    run = genscale.train(genscale.Config.from_yaml(config, settings), **given)
    return run, round(time.process_time() - began, 1)


@torch.no_grad()
def drawn(run: Any, pictures: int) -> dict[str, Tensor]:
    """What `evaluate` says of fresh pictures, fp64 `(policy and reference, pictures)`."""
    objective, group = run.objective, run.config.objective.group
    parts = [objective.evaluate(run.networks, {"sample": numbers})
             for numbers in torch.arange(FRESH, FRESH + pictures // group).split(16)]
    whole = {name: torch.cat([part[name] for part in parts]).double() for name in ("log_p", "log_reference", "reward")}
    return {name: torch.stack([half.flatten() for half in value.chunk(2, 1)]) for name, value in whole.items()}


def latent(source: str, seed: int, steps: int, groups: int, folder: Path, pictures: int) -> dict[str, Any]:
    """One latent policy beside the best one."""
    result, seconds = train("reward/digits-threes", folder, f"{source}-threes-{seed}-{steps}x{groups}",
                            {"model.from": str(folder / source), "run.seed": seed, "train.steps": steps,
                             "train.global_batch_size": groups, "train.ema_half_life": EMA_STEPS * groups,
                             "objective.rewards": [{"name": "classifier", "run": str(folder / source), "label": "3"}]})
    run = genscale.load(result.folder)
    found, beta = drawn(run, pictures), run.config.objective.beta
    before = found["reward"][1].mean().item()
    z = 1 - before + before * math.exp(1 / beta)
    best, share = before * math.exp(1 / beta) / z, found["reward"][0].mean().item()
    divergence = (found["log_p"] - found["log_reference"])[0].mean().item()
    gap = math.log(z) - (share / beta - divergence)
    return {"policy": "latent", "source": source, "seed": seed, "steps": steps, "groups": groups, "share_before": before,
            "share": share, "share_best": best, "divergence": divergence, "gap": gap, "gap_reported": result.evaluation["gap"],
            "tv_at_most": math.sqrt(max(gap, 0) / 2), "cpu_seconds": seconds}


def decoder(seed: int, folder: Path) -> dict[str, Any]:
    """One decoder beside the best one."""
    settings = {"model.from": str(folder / "bernoulli"), "model.policy": "decoder", "run.seed": seed, "objective.group": 16,
                "objective.beta": BETA_OF_PIXELS, "objective.rewards": [{"name": "left_half"}], "train.steps": 1000,
                "train.global_batch_size": 32, "train.evaluate_every": 0, "optimizer.lr": 3e-3}
    result, seconds = train("reward/digits-threes", folder, f"left-half-{seed}", settings, rewards={"left_half": LeftHalf})
    with REWARDS.knowing({"left_half": LeftHalf}):
        run = genscale.load(result.folder)
    with torch.no_grad():
        latents = torch.randn(4000, *run.objective.latent_shape, generator=torch.Generator().manual_seed(5))
        logits = {name: run.networks[name](latents)[0] for name in ("policy", "reference")}
    weight = torch.ones_like(logits["policy"])
    weight[..., weight.shape[-1] // 2 :] = -1
    best = logits["reference"] + weight / 8 / BETA_OF_PIXELS
    tv = {name: (each.sigmoid() - best.sigmoid()).abs().mean().item() for name, each in logits.items()}
    return {"policy": "decoder", "source": "bernoulli", "seed": seed, "pixel_tv_before": tv["reference"],
            "pixel_tv": tv["policy"], "gap_reported": result.evaluation["gap"], "cpu_seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a run."""
    lines = []
    for row in rows:
        what = f"{row['policy']:8} {row['source']:10} seed {row['seed']}  "
        if row["policy"] == "latent":
            what += (f"{row['steps']:4} x {row.get('groups', 16)} groups  "
                     f"threes {row['share_before']:.3f} -> {row['share']:.3f} (best {row['share_best']:.3f})  "
                     f"gap {row['gap']:.3f} nats (reported {row['gap_reported']:.3f})  TV <= {row['tv_at_most']:.3f}")
        else:
            what += f"pixel TV {row['pixel_tv_before']:.4f} -> {row['pixel_tv']:.4f}"
        lines.append(f"{what}  {row['cpu_seconds']:.0f} s")
    return "\n".join(lines)


def met(row: dict[str, Any]) -> bool:
    """Whether a run is as near as was aimed at."""
    if row["policy"] == "decoder":
        return row["pixel_tv"] <= AIMS["pixel_tv"]
    return row["gap"] <= AIMS["gap"] and abs(row["share"] - row["share_best"]) <= AIMS["share_off"]


def rows(arguments: argparse.Namespace, folder: Path, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those that were not measured before."""
    for what in arguments.what.split(","):
        source = "bernoulli" if what == "decoder" else what
        size = None if what == "decoder" else (arguments.steps or SIZES[what][0], arguments.groups or SIZES[what][1])
        missing = [seed for seed in range(1, arguments.seeds + 1)
                   if not any((row["source"], row["seed"], size_of(row)) == (source, seed, size) for row in done)]
        if missing:
            train(*(("vae/digits", folder, source, BERNOULLI) if what == "decoder" else (f"{what}/digits", folder, what, {})))
        for seed in missing:
            yield latent(what, seed, *size, folder, arguments.pictures) if size else decoder(seed, folder)


def size_of(row: dict[str, Any]) -> tuple[int, int] | None:
    """Steps and groups in each, of a latent policy."""
    return (row["steps"], row.get("groups", 16)) if row["policy"] == "latent" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--what", default="decoder,vae,dcgan")
    parser.add_argument("--steps", type=int, help="of a latent policy (default: 800 for vae, 300 for dcgan)")
    parser.add_argument("--groups", type=int, help="in a step, of 32 pictures each (default: 64 for vae, 16 for dcgan)")
    parser.add_argument("--pictures", type=int, default=20_000, help="fresh ones, of policy and of prior")
    parser.add_argument("--folder", type=Path, help="keeps the runs (default: they are deleted)")
    parser.add_argument("--out", type=Path, help="JSON file to write; rows that it holds are not measured again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {**circumstances(["torch"]), "aims": AIMS, "all_met": False, "results": []}
    if arguments.out and arguments.out.exists():
        result["results"] = json.loads(arguments.out.read_text())["results"]
    with tempfile.TemporaryDirectory() as temporary:
        for row in rows(arguments, arguments.folder or Path(temporary), list(result["results"])):
            result["results"].append(row | {"commit": result["commit"]})  # a file may hold rows of several
            result["all_met"] = all(met(row) for row in result["results"] if size_of(row) in (None, SIZES.get(row["source"])))
            print(table([row]), flush=True)
            write(result, arguments.out)
    print(table(result["results"]))


if __name__ == "__main__":
    main()
