"""Tensor bytes of the same step, counted for real and planned: what a plan of memory is worth.

    python benchmarks/plan_memory.py --out benchmarks/results/plan-memory-cpu.json
    python benchmarks/plan_memory.py --resident --out benchmarks/results/plan-resident-cpu.json

Each case is a step of one process on the CPU, in fp32 and bf16, counted over the second step: the births and deaths of all
storages that torch makes, with real tensors, and with those of `genscale plan`, which have no values.

With --resident, the peaks of real processes that memory.py and image_memory.py have measured stand beside their plans.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genscale.families import FAMILIES
from genscale.objectives.base import Blueprint
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, check_objective, plan_elsewhere
from genscale.planning.account import Machine
from genscale.planning.recorder import Recorder
from genscale.planning.step import Spread, noted, run_step, trace_step, without_compiler
from genscale.planning.summary import peaks_of
from genscale.planning.trace import plan_step
from genscale.settings.config import Config
from genscale.settings.parser import load_config, parse_config
from genscale.training.setup import averaged_networks, derive_accumulation, prepare
from genscale.training.trainer import Trainer
from memory import GIB, PROCESSES, VARIANTS
from report import circumstances, write

import torch

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["train.global_batch_size=8", "train.micro_batch_size=4", "train.steps=4"]
FAMILY_CASES = {
    "gpt": ("gpt/gpt2-124m.yaml", ["model.layers=3", "model.width=128", "model.heads=4", "model.vocab_size=2048",
                                   "model.positions=128", "data.sequence_length=128"]),
    "gpt, llama": ("gpt/llama-1b.yaml", ["model.layers=3", "model.width=128", "model.heads=4", "model.kv_heads=2",
                                         "model.mlp_width=384", "model.vocab_size=2048", "model.positions=128",
                                         "data.sequence_length=128"]),
    "dcgan": ("dcgan/dcgan-64.yaml", ["model.width=16", "data.size=32"]),
    "residual": ("dcgan/clipart-128.yaml", ["model.width=8", "data.size=32"]),
    "points": ("points/ring.yaml", []),
    "vae": ("vae/fashion-mnist-32.yaml", ["model.width=16"]),
    "vae_gan": ("vae_gan/digits.yaml", []),
}
"""A config, and what makes it small, by name."""
ADVERSARIAL, PENALISED = ("dcgan", "residual", "points"), ("residual", "points")


def cases() -> Iterator[tuple[str, list[str]]]:
    """Every family with every kind of checkpointing, with an average and, of GANs, a penalty."""
    for name in FAMILY_CASES:
        for kind, average, precision in itertools.product(("none", "full", "selective"), (0, 1000), ("fp32", "bf16")):
            settings = [f"parallel.activation_checkpointing={kind}", f"train.ema_half_life={average}",
                        f"train.precision={precision}"]
            for penalty in (0, 1) if name in PENALISED and kind != "selective" else (0,):
                extra = [f"objective.r1={penalty}.0", "objective.r2=0.0", "objective.regularise_every=16"] \
                    if name in ADVERSARIAL else []
                yield name, [*settings, *extra]


def config_of(name: str, settings: list[str]) -> Config:
    """The config of a case."""
    file, small = FAMILY_CASES[name]
    flags = [f"--{each}" for each in ["parallel.strategy=single", *SMALL, *small, *settings]]
    return without_compiler(load_config(FAMILIES, ROOT / "configs" / file, flags))


def compare(config: Config) -> dict[str, Any]:
    """Peak bytes of tensors in a step, counted and planned."""
    family = FAMILIES[config.model.family]
    plan = plan_elsewhere(config.parallel, config.train.precision, 1, config.optimizer.name)
    check_objective(plan, config.parallel, family.blueprint(config).objective)
    spread = Spread(plan, *derive_accumulation(config.train, 1))
    traced = trace_step(config, family.blueprint(config), spread, "cpu")
    planned = max(peak.total for peak in peaks_of(traced.recorder, traced.first).values())
    counted = count_step(config, family.blueprint(config), spread)
    return {"counted": counted, "planned": round(planned), "ratio": round(planned / counted, 4)}


def count_step(config: Config, blueprint: Blueprint, spread: Spread) -> int:
    """Peak bytes of the storages that torch makes in a step that really runs."""
    recorder, objective = Recorder(), blueprint.objective
    processes = Processes()
    processes.note = lambda doing: noted(recorder, doing)  # type: ignore[method-assign]
    with recorder.recording():
        engine = build_engine(spread.plan, processes, config.parallel, config.train.precision, config.train.clip,
                              spread.micro_batch_size, spread.accumulation)
        averaged = averaged_networks(config.train.ema_half_life, config.model.family, objective)
        prepare(engine, objective, config.optimizer, averaged, None, None)
        trainer = Trainer(config, objective, engine, loader=None, hooks=[], last_good=lambda: "none")
        batches = [_batch(blueprint, spread.micro_batch_size, index) for index in range(min(spread.accumulation, 2))]
        first = run_step(recorder, engine, trainer, batches)
    processes.close()
    return round(max(peak.total for peak in peaks_of(recorder, first).values()))


def _batch(blueprint: Blueprint, size: int, index: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(index)
    batch = {name: torch.rand((size, *value.shape), generator=random) if value.is_floating_point()
             else torch.randint(0, 2, (size, *value.shape), generator=random).to(value.dtype)
             for name, value in blueprint.sample.items()}
    return {**batch, "sample": torch.arange(size) + size * index}


def resident() -> Iterator[dict[str, Any]]:
    """Peaks of real processes that have been measured, and their plans."""
    found = json.loads((ROOT / "benchmarks/results/memory-cpu.json").read_text())
    for name, row in found["results"].items():
        processes = PROCESSES if "strategy" in VARIANTS[name] else 1
        yield _beside(name, row["measured_gib"], _text_config(found["shape"], processes, **VARIANTS[name]), processes)
    found = json.loads((ROOT / "benchmarks/results/image-memory-cpu.json").read_text())
    for kind, row in found["results"].items():
        settings = [f"data.size={found['size']}", f"train.global_batch_size={found['batch']}", "train.precision=bf16",
                    f"parallel.activation_checkpointing={kind}"]
        config = load_config(FAMILIES, ROOT / "configs/dcgan/clipart-128.yaml", [f"--{each}" for each in settings])
        yield _beside(f"residual GAN, {kind}", row["peak_gib"], config, 1)


def _beside(case: str, measured: float, config: Config, processes: int) -> dict[str, Any]:
    planned = plan_step(config, Machine("cpu", processes, processes)).memory.peak / GIB
    return {"case": case, "measured_gib": measured, "planned_gib": round(planned, 3), "ratio": round(planned / measured, 3)}


def _text_config(shape: dict[str, int], processes: int, loss_chunk: int | None = None, strategy: str = "single",
                 activation_checkpointing: str = "none") -> Config:
    """The run of a variant of memory.py."""
    time, batch = shape["time"], shape["batch"]
    sizes = {name: shape[name] for name in ("layers", "heads", "width", "vocab_size")}
    model = {"family": "gpt", **sizes, "positions": time, "loss_chunk": loss_chunk or time * batch}
    settings = {**{f"model.{name}": value for name, value in model.items()}, "data.sequence_length": time,
                "data.tokenizer": "none", "train.global_batch_size": batch * processes, "train.micro_batch_size": batch,
                "train.precision": "fp32", "parallel.strategy": strategy,
                "parallel.activation_checkpointing": activation_checkpointing}
    return parse_config(FAMILIES, [f"--{name}={value}" for name, value in settings.items()])


def _counted(family: str | None) -> list[dict[str, Any]]:
    results = []
    for name, settings in cases():
        if family in (None, name):
            results.append({"case": name, "settings": settings, **compare(config_of(name, settings))})
            print(f"{name:12} {' '.join(each.split('.')[1] for each in settings):70} counted {results[-1]['counted']:>12,} "
                  f"planned {results[-1]['planned']:>12,} {results[-1]['ratio']:.4f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", help="one of FAMILY_CASES alone")
    parser.add_argument("--resident", action="store_true", help="beside the measured peaks of processes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.resident:
        results = []
        for row in resident():
            results.append(row)
            print("{case:28} measured {measured_gib:.3f} GiB, planned {planned_gib:.3f}: {ratio:.3f}".format(**row), flush=True)
    else:
        results = _counted(arguments.family)
    worst = max(abs(each["ratio"] - 1) for each in results)
    print(f"{len(results)} cases, at most {worst:.2%} off")
    write({**circumstances(["torch"]), "worst": worst, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
