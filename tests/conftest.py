"""Shared fixtures: a run small enough to take a second, and `genscale` in this process or in one of its own."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genscale.cli import main
from genscale.testing import processes
from genscale.testing.processes import GENSCALE, Outcome, Running, group
from genscale.testing.runs import Run

ROOT = Path(__file__).resolve().parents[1]


class ToldAtOnce:
    """Says what fails when it does: who is stopped for want of time says no more at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self.terminal = config.pluginmanager.getplugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            said = next((line for line in report.longreprtext.splitlines() if line.startswith("E ")), "")
            self.terminal.write_line(f"\n{report.nodeid} ({report.when}): {said[:200]}")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.pluginmanager.hasplugin("terminalreporter"):  # the processes of pytest-xdist have none
        session.config.pluginmanager.register(ToldAtOnce(session.config))


def pytest_itemcollected(item: pytest.Item) -> None:
    # Quick tests are those that are not slow: a cell of the matrix alone would be one of them.
    if item.get_closest_marker("matrix") and not item.get_closest_marker("slow"):
        raise pytest.UsageError(f"{item.nodeid} is marked matrix and must be marked slow too")


def pytest_collection_finish() -> None:
    # What is loaded by now stays: who looks for garbage, as the planner and DeepSpeed do, need not look through all of it.
    gc.collect()
    gc.freeze()


def run_here(*arguments: object) -> Outcome:
    """`genscale <arguments>` in this process: a fresh one spends seconds on importing torch."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in `start`: sums come out alike
    handlers = {logger: list(logger.handlers) for logger in (logging.getLogger(), logging.getLogger("genscale"))}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # --help and --print_config
        code = int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
        logging.captureWarnings(False)
        for logger, before in handlers.items():
            for handler in set(logger.handlers) - set(before):
                logger.removeHandler(handler)
                with contextlib.suppress(OSError):  # a full disk
                    handler.close()
    return Outcome(code, out.getvalue(), err.getvalue())


def start(*arguments: object, command: tuple[str, ...] = GENSCALE, cwd: Path = ROOT, **variables: str) -> Running:
    """`genscale <arguments>` (or another command) in a process and a session of its own."""
    return processes.start(*arguments, command=command, folder=cwd,
                           environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables})


def finish(running: Running, timeout: float = 120) -> Outcome:
    """Wait for the end. A process that hangs, or a child of it that stays behind, fails the test (and is killed)."""
    done = running.finish(timeout)
    assert done.code is not None, f"still running after {timeout} s\n{done.err}"
    assert not done.left_behind, f"left behind: {done.left_behind}"
    return done


def run_apart(*arguments: object, timeout: float = 120, **options: Any) -> Outcome:
    """`start`, then `finish`."""
    return finish(start(*arguments, **options), timeout)


@pytest.fixture(scope="session")
def genscale() -> Callable[..., Outcome]:
    """`genscale("train", "--config", ...)` in this process; strategies single and ddp only."""
    return run_here


@pytest.fixture(scope="session")
def genscale_process() -> Callable[..., Outcome]:
    """The same in a process of its own, for several processes, other strategies and what must not touch this process; forked,
    unless another command is given."""
    return functools.partial(run_apart, command=group(1, *GENSCALE[1:]))


@pytest.fixture(scope="session")
def genscale_group() -> Callable[..., Outcome]:
    """The same in two processes out of one import, for what is not about their launcher."""
    return functools.partial(run_apart, command=group(2, *GENSCALE[1:]))


@pytest.fixture(scope="session")
def genscale_start() -> Callable[..., Running]:
    """Starts it and returns at once, for what happens meanwhile; end with `genscale_finish`."""
    return start


@pytest.fixture(scope="session")
def genscale_finish() -> Callable[..., Outcome]:
    return finish


@pytest.fixture(scope="session")
def python_process() -> Callable[..., str]:
    """`python_process(code, *words)`: what Python code prints in a process of its own, which must end well."""

    def run(code: str, *words: object, **options: Any) -> str:
        done = run_apart(*words, command=(sys.executable, "-c", code), **options)
        assert done.code == 0, done.err
        return done.out

    return run


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 50 kB of English in paragraphs."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:50_000])
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_text: Path) -> dict[str, Any]:
    """The sections of a tiny run, without run.dir."""
    return {
        "run": {"name": "tiny"},
        "model": {"family": "gpt", "layers": 2, "heads": 2, "width": 32, "positions": 32},
        "data": {"source": str(tiny_text), "sequence_length": 32, "validation_blocks": 8},
        "train": {"steps": 6, "global_batch_size": 4, "precision": "fp32", "log_every": 1, "checkpoint_every": 2},
        "optimizer": {"lr": 1e-3},
        "tracking": {"wandb": "disabled"},
    }


@pytest.fixture
def tiny_config(tiny_settings: dict[str, Any], tmp_path: Path) -> Path:
    """A YAML file of that run, which will lie in `<tmp_path>/runs/tiny`."""
    path = tmp_path / "tiny.yaml"
    settings = {**tiny_settings, "run": {**tiny_settings["run"], "dir": str(tmp_path / "runs")}}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def tiny_run(tmp_path: Path) -> Path:
    """The run folder of `tiny_config`; made by the run itself."""
    return tmp_path / "runs" / "tiny"


@pytest.fixture(scope="session")
def trained(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run. To be read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {**tiny_settings, "run": {"name": "tiny", "dir": str(folder)}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    done = run_here("train", "--config", folder / "tiny.yaml")
    assert done.code == 0, done.err
    return folder / "tiny"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("6m")`: a folder on a disk of that size (a tmpfs, which takes the right to mount one)."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={options}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False, timeout=20)


@pytest.fixture(scope="session")
def logged_steps() -> Callable[[Path], list[int]]:
    """Steps of the training lines of metrics.jsonl, in file order; empty where there is none."""
    return lambda run: [line["step"] for line in Run(run).metrics() if "loss" in line]


@pytest.fixture
def refuse(genscale, tiny_config, tiny_run, logged_steps) -> Callable[..., str]:
    """Run the tiny config with other settings; check that it is refused before a step, and return the one line."""

    def run(*overrides: object, config: Path = tiny_config) -> str:
        before = logged_steps(tiny_run)
        message = genscale("train", "--config", config, *overrides).message()
        assert logged_steps(tiny_run) == before
        return message

    return run


@pytest.fixture
def copied(trained, tiny_config, tiny_run) -> Path:
    """The trained run in the place of `tiny_config`'s: a run to go on from."""
    shutil.copytree(trained, tiny_run)
    return tiny_run
