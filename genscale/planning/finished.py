"""A finished run beside its plan: what was said it would take, and what it took."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.plan import Plan, expected_error
from genscale.planning.profiles import profile, profile_names
from genscale.settings.config import Config
from genscale.settings.parser import load_config
from genscale.tracking.metrics_file import read_metrics

WARM_UP = 2
"""Logged lines whose time is of the first steps, in which kernels are chosen and compiled."""


@dataclass(frozen=True)
class Finished:
    """What a run folder says of a run.

    Attributes:
        processes: that trained it last.
        device: as torch calls it; None where the run did not write it down.
        step_seconds: median of the logged steps, without the wait for data.
        peak_bytes: that torch's allocator held on rank 0; None where there was no GPU.
        checkpoint_bytes: of the tensors of the latest checkpoint.
    """

    folder: Path
    config: Config
    processes: int
    processes_per_node: int
    device: str | None
    step_seconds: float | None
    peak_bytes: int | None
    checkpoint_bytes: int

    def machine(self, gpu: str | None, gpus_per_node: int | None, between_nodes: float | None) -> Machine:
        """That which it was trained on; `gpu` beats what was written down. Raises UserError where nobody knows the device."""
        if gpu is None:
            gpu = next((name for name in profile_names() if profile(name).device == self.device), None)
        if gpu is None:
            known = f"was trained on {self.device}, which has no profile" if self.device else "does not say what it ran on"
            raise UserError(f"--gpu: {self.folder} {known}; name one (`genscale plan --calibrate` makes it)")
        return Machine(gpu, self.processes, gpus_per_node or self.processes_per_node, between_nodes)


@dataclass(frozen=True)
class Line:
    """One figure, planned and measured, in the same unit."""

    name: str
    planned: float
    measured: float | None
    unit: str
    expected: float

    @property
    def error(self) -> float | None:
        """Relative; above zero where too much was planned."""
        return None if not self.measured else self.planned / self.measured - 1


def finished(folder: Path) -> Finished:
    """Read a run folder. Raises UserError where there is no finished step in it."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--measure: {folder} is no run folder (it has no config.yaml)")
    config = load_config(FAMILIES, folder / "config.yaml")
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise UserError(f"--measure: {folder} has no checkpoint, which would say how many processes trained it")
    about, tensors = _told_by(checkpoints[-1])
    processes = int(about.get("world_size", 1))
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "step_seconds" in line]
    steady = lines[WARM_UP:] or lines[-1:]
    seconds = [line["step_seconds"] - line.get("data_wait_seconds", 0.0) for line in steady]
    parallel = replace(config.parallel, strategy=about.get("strategy", config.parallel.strategy))
    return Finished(folder, replace(config, parallel=parallel), processes, int(about.get("processes_per_node", processes)),
                    about.get("device"), statistics.median(seconds) if seconds else None, about.get("peak_memory_bytes"),
                    tensors)


def _told_by(checkpoint: Checkpoint) -> tuple[dict[str, Any], int]:
    """What made a checkpoint, and the bytes of its tensors. Raises UserError where it is damaged."""
    try:
        manifest = checkpoint.manifest()
        about = dict(manifest.get("about", {}))
        if any(not isinstance(about.get(key, 1), int) for key in ("world_size", "processes_per_node")):
            raise ValueError("about")
        return about, _tensor_bytes(checkpoint, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--measure: {checkpoint.path} is damaged ({checkpoint.problem() or 'its manifest'}); move it "
                        "away, so that the one before it is read") from None


def _tensor_bytes(checkpoint: Checkpoint, manifest: dict[str, Any]) -> int:
    """Of its tensors: without headers, which are text."""
    total = 0
    for name, entry in manifest["files"].items():
        if name.endswith(".safetensors"):
            with (checkpoint.path / name).open("rb") as file:
                total += int(entry["bytes"]) - 8 - int.from_bytes(file.read(8), "little")
    return total


def beside(plan: Plan, run: Finished) -> list[Line]:
    """The figures of both."""
    units = plan.units_per_second * plan.time.step
    held = [part for part in plan.step.memory.parts if part.category != "CUDA and NCCL"]  # which torch does not count
    peak = sum(part.bytes for part in held)
    return [Line("peak memory a GPU", peak / 2**30, None if run.peak_bytes is None else run.peak_bytes / 2**30, "GiB",
                 sum(map(expected_error, held)) / peak),
            Line("checkpoint", plan.step.memory.checkpoint_bytes / 2**20, run.checkpoint_bytes / 2**20, "MiB", 0.0),
            Line("time of a step", plan.time.step, run.step_seconds, "s", plan.time.spread),
            Line(f"{plan.unit} a second", plan.units_per_second, units / run.step_seconds if run.step_seconds else None, "",
                 plan.time.spread)]


def table(lines: list[Line]) -> str:
    """As text."""
    rows = [f"{'':<22}{'planned':>14}{'measured':>14}{'error':>9}{'expected':>10}"]
    for line in lines:
        measured = "not logged" if line.measured is None else f"{line.measured:,.4g}"
        error = "" if line.error is None else f"{line.error:+.1%}"
        within = "" if line.error is None else "" if abs(line.error) <= line.expected + 5e-4 else "  outside"
        name = f"{line.name}{f' ({line.unit})' if line.unit else ''}"
        rows.append(f"{name:<22}{line.planned:>14,.4g}{measured:>14}{error:>9}{f'+-{line.expected:.0%}':>10}{within}")
    return "\n".join(rows)
