"""Real runs for the tests: `genscale train` in processes of its own, and worker scripts, asked many things in one start."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock

from genscale.testing import runs
from genscale.testing.runs import Run
from genscale.testing.workers import WHOLE_RUNS, ask

ROOT = Path(__file__).resolve().parents[2]
WORKER, IMAGE_WORKER, FROZEN_WORKER = (
    Path(__file__).with_name(f"{name}_worker.py") for name in ("engine", "image_engine", "frozen"))
TIMEOUT = 280
SETTINGS = {
    "model.layers": 2, "model.heads": 2, "model.width": 32, "model.positions": 32, "data.sequence_length": 32,
    "data.lanes": 12, "data.validation_blocks": 2, "train.steps": 10, "train.global_batch_size": 12,
    "train.log_every": 1, "train.precision": "fp32", "schedule.warmup_steps": 10, "optimizer.lr": 1e-3,
    "tracking.wandb": "disabled",
}  # fmt: skip
PREVIEW = {**SETTINGS, "parallel.strategy": "fsdp2", "train.steps": 3, "model.positions": 256, "optimizer.lr": 1e-2,
           "schedule.warmup_steps": 0, "model.init_std": 0.2}
Answers = dict[str, Any]


@pytest.fixture(scope="session")
def train() -> Callable[..., Run]:
    """`train(folder, strategy, processes=2, **{"train.steps": 4, ...})`: one real run."""

    def run(folder: Path, strategy: str, processes: int = 2, **settings: Any) -> Run:
        settings = {**SETTINGS, **settings, "parallel.strategy": strategy}
        return runs.train(folder, settings, 1 if strategy == "single" else processes, timeout=TIMEOUT,
                          environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})

    return run


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Answers]:
    """`answers(script, {"name": {setting: value}})`: what a worker script says of each variant, all in one start of processes.
    The same question is asked by every process of pytest-xdist that has a test of a module: it is answered once for all."""

    def once(script: Path, variants: Answers, processes: int = 2, extra: dict[str, str] | None = None) -> Answers:
        root = tmp_path_factory.getbasetemp()
        root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
        asked = json.dumps([script.name, variants, processes, extra])
        folder = root / f"answers-{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
        with FileLock(f"{folder}.lock"):
            if (folder / "answers.pt").exists():
                return torch.load(folder / "answers.pt", weights_only=True)
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}
            return ask(script, variants, folder, processes, TIMEOUT, environment)

    return once


@pytest.fixture(scope="session")
def engines(answers) -> Callable[..., Answers]:
    """`engines({"name": {setting: value}})`: what engine_worker.py measured of each variant."""
    return functools.partial(answers, WORKER)


@pytest.fixture(scope="session")
def image_engines(answers) -> Callable[..., Answers]:
    """The same of image_engine_worker.py."""
    return functools.partial(answers, IMAGE_WORKER)


@pytest.fixture(scope="session")
def frozen_runs(answers) -> Callable[..., Answers]:
    """The same of frozen_worker.py."""
    return functools.partial(answers, FROZEN_WORKER)


@pytest.fixture(scope="session")
def quick_runs(answers) -> dict[str, Run]:
    """Whole runs on two processes, all in one start of them: by strategy, the run of `settings` with accumulation; `<strategy>
    again`, a copy that was cut after step 5 and goes on; and `preview`, which samples."""
    common = {**SETTINGS, "train.checkpoint_every": 5, "train.micro_batch_size": 3}
    variants: Answers = {"preview": {"settings": PREVIEW}}
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        settings = {**common, "parallel.strategy": strategy}
        variants |= {strategy: {"settings": settings}, f"{strategy} again": {"settings": settings, "again_from": [strategy, 5]}}
    folders = answers(WHOLE_RUNS, variants)
    return {name: Run(Path(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """A worker script as a module: its data and initial weights, for computing the truth."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def worker(load_module) -> ModuleType:
    return load_module(WORKER)


@pytest.fixture(scope="session")
def image_worker(load_module) -> ModuleType:
    return load_module(IMAGE_WORKER)


@pytest.fixture(scope="session")
def frozen_worker(load_module) -> ModuleType:
    return load_module(FROZEN_WORKER)


@pytest.fixture(scope="session")
def difference() -> Callable[[list[float], list[float]], float]:
    """Largest relative difference of two sequences."""

    def largest(values: list[float], expected: list[float]) -> float:
        return max(abs(value - true) / abs(true) for value, true in zip(values, expected, strict=True))

    return largest
