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
TIMEOUT = 500
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
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """`once("name", make)`: a folder that `make(folder)` fills, once for all processes of pytest-xdist that have tests of a
    module."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], Any]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def answers(once) -> Callable[..., Answers]:
    """`answers(script, {"name": {setting: value}})`: what a worker script says of each variant, all in one start of processes.
    The same question of several tests is answered once for all."""

    def asked(script: Path, variants: Answers, processes: int = 2, extra: dict[str, str] | None = None) -> Answers:
        question = json.dumps([script.name, variants, processes, extra])
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}
        folder = once(f"answers-{hashlib.sha256(question.encode()).hexdigest()[:16]}",
                      lambda folder: ask(script, variants, folder, processes, TIMEOUT, environment))
        return torch.load(folder / "answers.pt", weights_only=True)

    return asked


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
def whole_runs(answers) -> Callable[..., dict[str, Run]]:
    """`whole_runs({"name": {"settings": {"train.steps": 4, ...}}}, processes=2)`: real runs, all in one start of processes,
    with `again_from` where one is to go on (see `genscale.testing.workers.run_of`)."""

    def run(variants: Answers, processes: int = 2) -> dict[str, Run]:
        variants = {name: {**variant, "settings": {**SETTINGS, **variant["settings"]}} for name, variant in variants.items()}
        return {name: Run(Path(folder)) for name, folder in answers(WHOLE_RUNS, variants, processes).items()}

    return run


@pytest.fixture(scope="session")
def quick_runs(whole_runs) -> dict[str, Run]:
    """Whole runs on two processes, all in one start of them: by strategy, the run of `settings` with accumulation; `<strategy>
    again`, a copy that was cut after step 5 and goes on; and `preview`, which samples."""
    common = {"train.checkpoint_every": 5, "train.micro_batch_size": 3}
    variants: Answers = {"preview": {"settings": PREVIEW}}
    for strategy in ("ddp", "zero2", "zero3", "fsdp2"):
        settings = {**common, "parallel.strategy": strategy}
        variants |= {strategy: {"settings": settings}, f"{strategy} again": {"settings": settings, "again_from": [strategy, 5]}}
    return whole_runs(variants)


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
