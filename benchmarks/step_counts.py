"""What a step does beside arithmetic, where no GPU is: casts, copies into another layout, copies that the host waits for.

    python benchmarks/step_counts.py --out benchmarks/results/step-counts.json

Of every network's phases, forward and backward of one micro-batch: operations that a device would be given one by one (views
are none), casts and copies of layout under bf16 autocast on the CPU, with the bytes that they read and write; and copies to the
device that the host waits for, on the meta device, which has no values to read.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import genscale
from genscale.families import family
from genscale.rng import Draws
from report import circumstances, write

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt", {"model.layers": 4}),
    "llama": ("gpt", {"model.layers": 4, "model.preset": "llama"}),
    "dcgan": ("dcgan", {"data.size": 32, "data.channels": 3, "model.width": 16, "objective.augmentation": "[]"}),
    "residual gan": ("dcgan", {"data.size": 32, "data.channels": 3, "model.width": 16, "model.architecture": "residual",
                               "model.generator_norm": "group", "model.discriminator_norm": "none",
                               "objective.augmentation": "[color,translation,cutout]"}),
    "vae": ("vae", {"data.size": 32, "data.channels": 3, "model.width": 16}),
}  # fmt: skip
SAMPLES = 8
META = torch.device("meta")
aten = torch.ops.aten
NO_WORK = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
           "_record_function_enter_new", "_record_function_exit"}


def is_work(function: Any) -> bool:
    """Whether a device is given anything to do."""
    return not function.is_view and function.name().split("::")[1].split(".")[0] not in NO_WORK


class Counts(TorchDispatchMode):
    """Counts operations as they are sent to the device.

    Attributes:
        found: how many of each kind.
        sites: of casts and copies, how many and how many bytes by what they turn into what.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found, self.sites = Counter[str](), dict[str, list[int]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if is_work(function):
            self.found["operations"] += 1
        source, target = (args[1], args[0]) if function is aten.copy_.default else (args[0] if args else None, out)
        if function in (aten.copy_.default, aten._to_copy.default, aten.clone.default) and isinstance(source, Tensor):
            self._note(source, target, kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:] == (True,)))
        return out

    def _note(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device != target.device:
            kind = "copies to the device" if non_blocking else "copies that the host waits for"
        elif source.dtype != target.dtype:
            kind = "casts"
        elif source.stride() != target.stride():
            kind = "copies into another layout"
        else:
            return
        size = source.nbytes + target.nbytes
        self.found[kind] += 1
        self.found[f"bytes of {kind}"] += size
        site = f"{kind}: {_named(source)} to {_named(target)}"
        count, total = self.sites.setdefault(site, [0, 0])
        self.sites[site] = [count + 1, total + size]


def _named(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def counted(name: str, device: torch.device, precision: str = "fp32", sites: int = 0) -> dict[str, Any]:
    """By phase of a network."""
    about, settings = NETWORKS[name]
    entry = family(about)
    config = genscale.config(about, {**entry.tiny, "train.precision": "fp32", **settings})
    data = entry.build_data(config.data, config.run.seed)
    try:
        objective = entry.build_objective(config, data)
        batch = _batch(config, about, device)
    finally:
        data.close()
    networks = {key: network.to_empty(device=device) for key, network in objective.networks.items()}
    found = {}
    for phase in objective.phases:
        for key, network in networks.items():
            network.requires_grad_(key == phase.network)
        draws = Draws(1, phase.name, 3, batch["sample"], device)
        with Counts() as counts:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                terms = phase.loss(networks, batch, draws)
            sum(value for term, value in terms.items() if term not in phase.statistics).backward()
        found[phase.name] = dict(sorted(counts.found.items()))
        largest = sorted(counts.sites.items(), key=lambda site: -site[1][1])[:sites]
        if sites:
            found[phase.name]["largest"] = {site: {"times": times, "bytes": size} for site, (times, size) in largest}
    return found


def _batch(config: Any, about: str, device: torch.device) -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    if about == "gpt":
        batch = {"tokens": generator.integers(0, 100, (SAMPLES, config.data.sequence_length + 1))}
    else:
        shape = (SAMPLES, config.data.channels, config.data.size, config.data.size)
        batch = {"image": generator.integers(0, 256, shape).astype(np.uint8)}
    return {"sample": torch.arange(SAMPLES), **{key: torch.from_numpy(value).to(device) for key, value in batch.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sites", type=int, default=0, help="show so many of the largest casts and copies")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result = circumstances(["torch"]) | {"samples": SAMPLES, "networks": {}}
    for name in arguments.networks.split(","):
        waits = counted(name, META)
        found = counted(name, torch.device("cpu"), "bf16", arguments.sites)
        for phase, counts in found.items():
            counts["copies that the host waits for"] = waits[phase].get("copies that the host waits for", 0)
        result["networks"][name] = found
    write(result, arguments.out)


if __name__ == "__main__":
    main()
