"""Real runs for the tests: `genscale train` in processes of its own, and engines driven by engine_worker.py under torchrun."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock

from genscale.checkpoint.checkpoints import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
IMAGE_WORKER = Path(__file__).with_name("image_engine_worker.py")
FROZEN_WORKER = Path(__file__).with_name("frozen_worker.py")
TIMEOUT = 200
SETTINGS = {
    "model.layers": 2, "model.heads": 2, "model.width": 32, "model.positions": 32, "data.sequence_length": 32,
    "data.lanes": 12, "data.validation_blocks": 2, "train.steps": 10, "train.global_batch_size": 12,
    "train.log_every": 1, "train.precision": "fp32", "schedule.warmup_steps": 10, "optimizer.lr": 1e-3,
    "tracking.wandb": "disabled",
}  # fmt: skip


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what a launcher may have left in it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(extra or {})}


def run_to_end(command: list[str], extra: dict[str, str] | None = None) -> str:
    """Run a command, and fail the test if it fails or hangs. Returns what it printed."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(extra), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # launchers pass it on to their workers
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        pytest.fail(f"hung for {TIMEOUT} s: {' '.join(command)}")
    if process.returncode:
        pytest.fail(f"exit code {process.returncode}: {' '.join(command)}\n{output[-5000:]}")
    return output


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and the lines of metrics.jsonl by step."""

    folder: Path
    lines: dict[int, dict[str, Any]]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines.values()]

    def data_digests(self) -> list[int]:
        return [line["data_digest"] for line in self.lines.values()]

    def checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(self.folder / "checkpoints" / f"step-{step:08d}")

    def cut_after(self, step: int) -> Path:
        """A copy of the run folder as a kill right after the checkpoint of `step` and before any other would leave it."""
        copy = self.folder.with_name(f"{self.folder.name}-cut")
        shutil.copytree(self.folder, copy)
        for checkpoint in (copy / "checkpoints").iterdir():
            if checkpoint.name != f"step-{step:08d}":
                shutil.rmtree(checkpoint)
        return copy

    def resumed_from(self) -> list[str]:
        """Names of the checkpoints that this run folder's log says it continued from."""
        log = (self.folder / "logs" / "rank-00000.log").read_text()
        return [Path(path).name for path in re.findall(r"continuing from (\S+)", log)]


def launch(folder: Path, strategy: str, processes: int, settings: dict[str, Any]) -> Run:
    settings = {**settings, "parallel.strategy": strategy, "run.dir": folder.parent, "run.name": folder.name}
    command = [sys.executable, "-m", "genscale", "train"]
    command += ["--processes", str(processes)] if strategy != "single" else []
    run_to_end([*command, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(folder, {line["step"]: line for line in lines if "data_digest" in line})


@pytest.fixture(scope="session")
def train() -> Callable[..., Run]:
    """`train(folder, strategy, processes=2, **{"train.steps": 4, ...})`: one real run."""

    def run(folder: Path, strategy: str, processes: int = 2, **settings: Any) -> Run:
        return launch(folder, strategy, processes, {**SETTINGS, **settings})

    return run


def once(factory: pytest.TempPathFactory, worker: Path, variants: dict[str, dict[str, Any]], processes: int,
         extra: dict[str, str] | None) -> Path:
    """The file with what a worker script measured of each variant, all in one start of processes. The same question is asked by
    every process of pytest-xdist that has a test of a module: it is answered once for all of them."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    asked = json.dumps([worker.name, variants, processes, extra])
    out = root / f"engines-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
            run_to_end([*command, str(worker), json.dumps(variants), str(out)], extra)
    return out


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`engines({"name": {setting: value}})`: what engine_worker.py measured of each variant."""

    def run(variants: dict[str, dict[str, Any]], processes: int = 2, extra: dict[str, str] | None = None) -> dict[str, Any]:
        return json.loads(once(tmp_path_factory, WORKER, variants, processes, extra).read_text())

    return run


@pytest.fixture(scope="session")
def image_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The same of image_engine_worker.py, whose results are tensors."""

    def run(variants: dict[str, dict[str, Any]], processes: int = 2) -> dict[str, Any]:
        return torch.load(once(tmp_path_factory, IMAGE_WORKER, variants, processes, None), weights_only=True)

    return run


@pytest.fixture(scope="session")
def torch_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The same of any worker script: `torch_results(path, {"name": {setting: value}})`."""

    def run(path: Path, variants: dict[str, dict[str, Any]], processes: int = 2) -> dict[str, Any]:
        return torch.load(once(tmp_path_factory, path, variants, processes, None), weights_only=True)

    return run


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """engine_worker.py as a module: its data and initial weights, for computing the truth."""
    return load_module(WORKER)


@pytest.fixture(scope="session")
def image_worker() -> ModuleType:
    return load_module(IMAGE_WORKER)


@pytest.fixture(scope="session")
def frozen_worker() -> ModuleType:
    return load_module(FROZEN_WORKER)


@pytest.fixture(scope="session")
def frozen_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """What frozen_worker.py says of some variants, in one start of processes."""

    def run(variants: list[dict[str, Any]], processes: int = 2) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("frozen")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        run_to_end([*command, str(FROZEN_WORKER), json.dumps(variants), str(folder)])
        return json.loads((folder / "results.json").read_text())

    return run


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def difference() -> Callable[[list[float], list[float]], float]:
    """Largest relative difference of two sequences."""

    def largest(values: list[float], expected: list[float]) -> float:
        return max(abs(value - true) / abs(true) for value, true in zip(values, expected, strict=True))

    return largest
