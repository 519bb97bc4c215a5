"""What a GPU will be asked for, where none is: steps, whole runs and plans on a stand-in for one (fake_gpu.py).

    python benchmarks/without_gpu.py --out benchmarks/results/without-gpu.json

It takes a CUDA build of torch, a C compiler and CUDA's headers, which come with such a build. Networks: the nine of
gpu_acceptance.py, a step each in bf16, eager: operations that the device is given one by one, casts and changes of layout
among them, which attention it is, and what the host waits for (nothing is to be). Runs: every family, as `genscale train` has
it, with evaluations and checkpoints, and as `genscale sample` goes on from it. Plans: the peak of `genscale plan`, which plans
for a GPU by tensors on the CPU, beside that of the same step on CUDA's tensors, under one process and under four of ddp and
fsdp2. No value is computed and nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import genscale
from fake_gpu import environment, fake_gpu, missing
from genscale import cli
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.parallel import planned
from genscale.parallel.strategies import ParallelPlan, check_objective
from genscale.planning import step
from genscale.planning.recorder import Recorder
from genscale.planning.summary import peaks_of
from genscale.training.setup import derive_accumulation
from gpu_networks import SMALL, small
from plan_memory import FAMILY_CASES, config_of
from report import circumstances, write

import torch
from torch import Tensor

RUN = {"train.steps": 3, "train.precision": "bf16", "train.evaluate_every": 2, "train.sample_every": 2,
       "train.checkpoint_every": 2, "tracking.wandb": "disabled"}  # fmt: skip
SPREADS = {"single": 1, "ddp": 4, "fsdp2": 4}
PLANNED = [("bf16", "none"), ("bf16", "full"), ("fp32", "none")]


def networks() -> Iterator[dict[str, Any]]:
    """The fourth step of each, of one micro-batch."""
    for name, (_, _, options) in SMALL.items():
        if options.get("compile"):
            continue
        with fake_gpu() as watch:
            run = small(name, accumulation=1)
            run.step(3)
            watch.forget()
            torch.cuda.set_sync_debug_mode("error")  # sees what is copied beneath torch's dispatch
            try:
                run.step()
            except RuntimeError as error:
                watch.waits.append(str(error))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        attention = sorted(operation for operation in watch.operations if "attention" in operation)
        yield {"network": name, "operations": watch.operations.total(), "casts": watch.casts, "layouts": watch.layouts,
               "attention": attention, "waits": watch.waits}


def runs() -> Iterator[dict[str, Any]]:
    """Whole runs; the family image_reward starts from that of a VAE."""
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(FAMILIES, key=lambda name: name == "image_reward"):
            settings = {**family(name).tiny, **RUN, "run.dir": f"{folder}/{name}"}
            if name == "image_reward":
                settings["model.from"] = f"{folder}/vae/run"
            with fake_gpu() as watch:
                genscale.train(genscale.config(name, settings))
            trained = watch.operations.total()
            with fake_gpu() as watch:
                if cli.main(["sample", f"{folder}/{name}/run"]) != 0:
                    raise RuntimeError(f"{name} was trained and cannot be sampled from")
            yield {"family": name, "operations_of_training": trained, "of_sampling": watch.operations.total()}


class OnDevice(Recorder):
    """Of what is on the device alone."""

    def see(self, tensor: Tensor, category: str | None = None) -> None:
        if tensor.device.type != "cpu":
            super().see(tensor, category)


@contextlib.contextmanager
def dispatched_by_cuda() -> Iterator[None]:
    """Inside, a step that is planned for a GPU is traced on CUDA's tensors, and not on the CPU's as if they were."""
    begin = planned.PlannedProcesses.__init__

    def on_device(processes: planned.PlannedProcesses, *arguments: Any) -> None:
        begin(processes, *arguments)
        processes.device = torch.device("cuda", 0)

    with mock.patch.object(planned.PlannedProcesses, "__init__", on_device), \
            mock.patch.object(step, "as_on_cuda", contextlib.nullcontext), mock.patch.object(step, "Recorder", OnDevice):
        yield


def plans() -> Iterator[dict[str, Any]]:
    """Peak bytes of a step, planned on the CPU and traced on CUDA's tensors."""
    torch.autograd.set_multithreading_enabled(False)
    for name in FAMILY_CASES:
        for strategy, world in SPREADS.items():
            for precision, checkpointing in PLANNED:
                settings = [f"parallel.strategy={strategy}", f"train.precision={precision}", "train.ema_half_life=1000",
                            f"parallel.activation_checkpointing={checkpointing}"]
                config = config_of(name, settings)
                plan = ParallelPlan(strategy, "none", precision, world)
                try:
                    check_objective(plan, config.parallel, family(config.model.family).blueprint(config).objective)
                except UserError:  # a penalty in bf16 under fsdp2
                    continue
                spread = step.Spread(plan, *derive_accumulation(config.train, 1))

                def peak(config: Any = config, spread: step.Spread = spread) -> int:
                    traced = step.trace_step(config, family(config.model.family).blueprint(config), spread, "gpu")
                    return round(max(peak.total for peak in peaks_of(traced.recorder, traced.first).values()))

                ours = peak()
                with dispatched_by_cuda():
                    cudas = peak()
                yield {"case": f"{name}, {strategy} x {world}, {precision}, recomputed: {checkpointing}", "planned": ours,
                       "on_cuda": cudas, "ratio": round(ours / cudas, 4)}


SECTIONS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"networks": networks, "runs": runs, "plans": plans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, as in networks,plans")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking is not None:
        sys.exit(f"no stand-in for a GPU can be made: {lacking}")
    if not torch.cuda.is_available() or "a stand-in" not in torch.cuda.get_device_name():
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment(Path(folder))).returncode)
    result: dict[str, Any] = circumstances(["torch", "accelerate"])
    for name in arguments.only.split(","):
        result[name] = []
        for row in SECTIONS[name]():
            result[name].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
