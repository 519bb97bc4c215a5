"""genscale as a library: the lines of a notebook or script train, sample and look, and leave the process as they found it."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import json
import logging
import os
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import genscale
from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.families import FAMILIES
from genscale.testing.processes import torchrun

ROOT = Path(__file__).resolve().parents[1]
TWELVE = """
import genscale

looks = []
config = genscale.config("vae", {"train.steps": 6, "data.source": "digits", "data.size": 8, "data.channels": 1,
                                 "model.width": 8, "model.multipliers": [1, 2], "train.global_batch_size": 16,
                                 "train.log_every": 2, "train.ema_half_life": 64, "train.precision": "fp32",
                                 "data.workers": 0, "tracking.wandb": "disabled", "run.name": "door"})
run = genscale.train(config, hooks=[genscale.every(2, lambda report: looks.append((report.step, report.metrics["loss"])))])
losses = [line["loss"] for line in run.metrics if "loss" in line]
model = genscale.load(run.folder)
network, picture = model.networks["vae"], model.sample(seed=3)
"""
TINY = {"data.source": "digits", "data.size": 8, "data.channels": 1, "model.width": 8, "model.multipliers": [1, 2],
        "train.global_batch_size": 16, "train.precision": "fp32", "data.workers": 0, "tracking.wandb": "disabled"}


def tiny(folder: Path, **settings: Any) -> genscale.Config:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return genscale.config("vae", {**TINY, "run.dir": folder, "train.steps": 6, **dotted})


def state_of_process() -> dict[str, Any]:
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(each for each in known if isinstance(each, logging.Logger))]
    return {"environment": dict(os.environ), "group": torch.distributed.is_initialized(), "exceptions": sys.excepthook,
            "threads": threading.excepthook, "exit": sys.exit, "dtype": torch.get_default_dtype(),
            "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
                              torch.utils.deterministic.fill_uninitialized_memory), "tf32": torch.backends.cudnn.allow_tf32,
            "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)],
            "handlers": {each.name: [handler for handler in each.handlers if not isinstance(handler, logging.NullHandler)]
                         for each in loggers if each.handlers}, "level": logging.getLogger("genscale").level,
            "warnings": (warnings.showwarning, list(warnings.filters)), "linear": torch.nn.functional.linear,
            "random": torch.get_rng_state().tolist()[:64], "core threads": torch.get_num_threads()}


def test_twelve_lines_train_sample_and_look(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "my_script.py"
    script.write_text(TWELVE)
    found = runpy.run_path(str(script))
    assert found["run"].step == 6 and found["run"].folder == Path("runs/door")
    assert [step for step, _ in found["looks"]] == [2, 4, 6]
    assert [loss for _, loss in found["looks"]] == found["losses"] and all(type(loss) is float for loss in found["losses"])
    network = found["network"]
    assert isinstance(network, torch.nn.Module) and not network.training and found["model"].averaged
    average = list_checkpoints(Path("runs/door/checkpoints"))[-1].weights("vae", averaged=True)
    assert all(torch.equal(value, average(name)) for name, value in network.named_parameters())
    live = genscale.load("runs/door", step=6, averaged=False, device="cpu").networks["vae"]
    assert not all(torch.equal(value, average(name)) for name, value in live.named_parameters())
    assert found["picture"].dtype == np.uint8 and found["picture"].shape[2] == 3


def test_importing_genscale_loads_neither_torch_nor_the_families(python_process) -> None:
    code = ("import sys, genscale; dir(genscale); genscale.Hook, genscale.every(5, print), genscale.UserError\n"
            "print(sorted({'torch', 'numpy', 'jsonargparse', 'genscale.objectives'} & sys.modules.keys()))\n"
            "genscale.config('gpt', {'train.steps': 5}); print('torch' in sys.modules)")
    assert python_process(code).split("\n")[:2] == ["[]", "False"]


def test_the_process_is_left_as_it_was_found(tmp_path, capfd) -> None:
    genscale.train(tiny(tmp_path, train__steps=1))  # what is loaded at the first use stays
    before = state_of_process()
    with pytest.raises(genscale.UserError, match="train.global_batch_size|train.micro_batch_size"):
        genscale.train(tiny(tmp_path, train__micro_batch_size=3, run__name="refused"))
    genscale.train(tiny(tmp_path, run__name="again", run__deterministic=True, train__steps=2))
    after = state_of_process()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}


def test_in_another_thread_a_run_takes_no_signals(tmp_path, capfd) -> None:
    handlers: list[Any] = []
    config = tiny(tmp_path, train__steps=2)
    look = genscale.every(1, lambda report: handlers.append(signal.getsignal(signal.SIGTERM)))
    ran: list[int] = []
    thread = threading.Thread(target=lambda: ran.append(genscale.train(config, hooks=[look]).step))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert ran == [2] and handlers == [before, before]


class Sum(genscale.Hook):
    """Ends the run after a step, and remembers the losses so far."""

    every = 2

    def __init__(self, end: int) -> None:
        self.end, self.total, self.closed = end, 0.0, None

    def step(self, report: genscale.StepReport) -> None:
        self.total += report.metrics["loss"]
        report.last = report.last or report.step == self.end

    def state(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state(self, state: dict[str, Any]) -> None:
        self.total = state["total"]

    def close(self, failed: bool) -> None:
        self.closed = failed


def test_a_hook_keeps_its_state_in_checkpoints_and_may_end_a_run(tmp_path, capfd) -> None:
    whole, first, second = Sum(0), Sum(4), Sum(0)
    at_once = genscale.train(tiny(tmp_path, run__name="at-once"), hooks=[whole])
    stopped = genscale.train(tiny(tmp_path, run__name="in-two"), hooks=[first])
    assert stopped.step == 4 and stopped.stopped_by is None and first.closed is False
    genscale.train(tiny(tmp_path, run__name="in-two"), hooks=[second, Sum(0)])
    assert second.total == whole.total and whole.total > first.total > 0
    last = [Checkpoint(tmp_path / name / "checkpoints" / "step-00000006") for name in ("at-once", "in-two")]
    assert last[0].digest() == last[1].digest() == list_checkpoints(at_once.folder / "checkpoints")[-1].digest()
    assert last[0].state()["hooks"] == {"Sum": {"total": whole.total}}
    without = genscale.train(tiny(tmp_path, run__name="in-two", train__steps=8))  # the checkpoint is read without the hook
    assert without.step == 8 and "hooks that this run has not: Sum" in capfd.readouterr().err
    # What earlier versions wrote, and read, where no hook of the user's keeps a state.
    assert set(Checkpoint(without.folder / "checkpoints" / "step-00000008").state()) == {
        "step", "units", "best", "evaluation", "evaluation_left_out", "collapse", "accumulation", "scalers", "guards", "data",
        "plan", "world_size"}


def test_a_hook_that_fails_ends_the_run_with_its_own_error(tmp_path, capfd) -> None:
    def broken(report: genscale.StepReport) -> None:
        raise ZeroDivisionError("of the user's own")

    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        genscale.train(tiny(tmp_path), hooks=[genscale.every(2, broken)])
    ended = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert ended["how"] == "failed" and ended["step"] == 2 and "of the user's own" in ended["reason"]
    assert "in broken" in (tmp_path / "run" / "logs" / "rank-00000.log").read_text()
    with pytest.raises(TypeError, match=r"no genscale.Hook; genscale.every\(50, f\)"):
        genscale.train(tiny(tmp_path, run__name="other"), hooks=[broken])
    assert not (tmp_path / "other").exists()


def test_a_config_is_frozen_and_a_run_does_not_change_it(tmp_path, capfd) -> None:
    config = tiny(tmp_path, train__steps=1)
    before = copy.deepcopy(config)
    for section, name in (("train", "precision"), ("model", "family"), ("data", "source"), ("objective", "beta")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(config, section), name, "other")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = before.train
    genscale.train(config)
    assert config == before and config.parallel.strategy == "auto"


def test_every_section_of_every_family_is_frozen() -> None:
    for name, family in FAMILIES.items():
        for section in (family.model_settings, family.data_settings, family.objective_settings):
            assert section.__dataclass_params__.frozen, f"{name}: {section.__name__}"


def test_settings_are_checked_as_on_the_command_line(refuse_door, tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": {"family": "gpt"}, "train": {"steps": 7}}))
    assert genscale.Config.from_yaml(file, {"optimizer.betas": (0.8, np.float64(0.9))}).optimizer.betas == (0.8, 0.9)
    assert genscale.config(file, {"parallel.compile": True, "train.micro_batch_size": None}).train.steps == 7
    assert genscale.config("vae", {"data.source": "a: b, c"}).data.source == "a: b, c"
    assert refuse_door("vae", {"train.step": 5}).startswith("--train.step: unknown setting (did you mean")
    assert "at least 1" in refuse_door("vae", {"train.steps": 0})
    assert "did you mean 'vae'" in refuse_door("vaee", {})


@pytest.fixture
def refuse_door():
    def refuse(*arguments: Any) -> str:
        with pytest.raises(genscale.UserError) as refusal:
            genscale.config(*arguments)
        return str(refusal.value)

    return refuse


@pytest.mark.parametrize("module", ["genscale.api", "genscale.hook"])
def test_the_examples_run(module) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


def test_type_checkers_are_told_of_every_public_name() -> None:
    stub = (ROOT / "genscale" / "__init__.pyi").read_text()
    for name in genscale.__all__:
        assert f" as {name}\n" in stub or f"{name}: str" in stub
        assert getattr(genscale, name) is not None


GROUP = TWELVE.replace('"data.workers": 0', '"data.workers": 1') + """
import os, sys
from pathlib import Path
import torch.distributed
from genscale.cli import main

assert not torch.distributed.is_initialized() and "vae" in model.networks
settings = ["--train.steps=6", "--data.source=digits", "--data.size=8", "--data.channels=1", "--model.width=8",
            "--model.multipliers=[1, 2]", "--train.global_batch_size=16", "--train.log_every=2", "--train.ema_half_life=64",
            "--train.precision=fp32", "--data.workers=0", "--tracking.wandb=disabled", "--model.family=vae"]
assert main(["train", *settings, "--run.name=typed"]) == 0
from genscale.checkpoint.checkpoints import list_checkpoints
digests = {list_checkpoints(Path("runs") / name / "checkpoints")[-1].digest() for name in ("door", "typed")}
assert len(digests) == 1, digests
if run.is_main:
    print("looks", len(looks), "world", os.environ["WORLD_SIZE"], "strategy", run.folder, flush=True)
else:
    assert not looks
"""


@pytest.fixture
def launched(tmp_path, genscale_process) -> Callable[..., str]:
    """What the script says under a launcher."""
    script = tmp_path / "my_script.py"
    script.write_text(GROUP)

    def launch(*launcher: str) -> str:
        done = genscale_process(script, command=launcher, cwd=tmp_path, DS_ACCELERATOR="cpu", timeout=250)
        assert done.code == 0, done.err
        assert "looks 3 world 2" in done.out, done.out
        return done.err

    return launch


@pytest.mark.slow
def test_a_script_under_torchrun_is_the_run_of_the_command_line(launched) -> None:
    """And another run follows it in the same processes."""
    assert ", ddp, 2 processes" in launched(*torchrun(2))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.matrix)
                                                 for name in ("ddp", "zero1", "zero3", "fsdp2"))])  # fmt: skip
def test_a_script_under_accelerate_launch_is_the_run_of_the_command_line(strategy, launched) -> None:
    """The launcher's wish holds for both runs: its variables are there again after the first."""
    file = ROOT / "launch" / f"{strategy}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    assert launched(*launcher).count(f", {strategy}, 2 processes") == 2
