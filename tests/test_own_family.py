"""docs/examples: a network, a loss and a data set of one's own, under every strategy, killed and resumed."""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.families import FAMILIES
from genscale.testing.processes import Running, group
from genscale.testing.runs import Run, flags

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
SETTINGS = {"train.steps": 30, "train.global_batch_size": 12, "train.micro_batch_size": 3, "train.precision": "fp32",
            "train.log_every": 1, "train.checkpoint_every": 10, "optimizer.name": "sgd", "optimizer.lr": 0.05,
            "schedule.name": "constant", "tracking.wandb": "disabled"}  # fmt: skip
SHORT = {"train.steps": 4}
OTHERS = [("own_gpt", "fsdp2"), ("own_gpt", "ddp"), ("own_gpt", "zero2"), ("own_gpt", "zero3"),
          ("own_diffusion", "ddp"), ("own_diffusion", "fsdp2"), ("own_diffusion", "zero3")]  # fmt: skip
CELLS = [("own_diffusion", "zero2"), *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in OTHERS)]


def words(name: str, folder: Path, **settings: Any) -> list[str]:
    """The arguments of a run of an example."""
    settings = {"model.family": name, "run.dir": folder, "run.name": "run", **SETTINGS, **settings}
    return ["train", *flags(settings)]


def same_run(folder: Path, other: Path) -> None:
    ours, theirs = Run(folder / "run"), Run(other / "run")
    assert [line["step"] for line in ours.lines()] == [line["step"] for line in theirs.lines()]
    assert ours.order() == theirs.order()
    assert ours.losses() == pytest.approx(theirs.losses(), rel=1e-5)


def kill_after_checkpoint(process: Running, folder: Path) -> None:
    """SIGKILL for the program and all that it has started, as soon as there is a first checkpoint."""
    deadline = time.monotonic() + 120
    while not (folder / "run" / "checkpoints" / "step-00000010").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()


@pytest.fixture(scope="module")
def alone(genscale_process, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an example's run in one process."""
    done: dict[str, Path] = {}

    def run(name: str, **settings: Any) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            example = (sys.executable, str(EXAMPLES / f"{name}.py"))
            outcome = genscale_process(*words(name, done[name]), command=group(1, example[1]))
            assert outcome.code == 0, outcome.err
            assert f"python {example[1]} train --processes 2" in outcome.out
            assert (f"python {example[1]} sample" in outcome.out) == (name == "own_diffusion"), "has a preview"
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), CELLS)
def test_an_example_is_the_same_run_on_two_processes_and_after_a_kill(name, strategy, alone, genscale_process, genscale_start,
                                                                      tmp_path):
    example = (sys.executable, str(EXAMPLES / f"{name}.py"))
    asked = {"parallel.strategy": strategy}
    outcome = genscale_process(*words(name, tmp_path / "straight", **asked), command=group(2, example[1]))
    assert outcome.code == 0, outcome.err
    same_run(tmp_path / "straight", alone(name))
    losses = Run(tmp_path / "straight" / "run").losses()
    assert losses[-1] < 0.95 * losses[0]

    resumed = words(name, tmp_path / "killed", **asked)
    kill_after_checkpoint(genscale_start(*resumed, "--processes", "2", command=example), tmp_path / "killed")
    assert not (tmp_path / "killed" / "run" / "checkpoints" / "step-00000030").exists()
    outcome = genscale_process(*resumed, command=group(2, example[1]))
    assert outcome.code == 0, outcome.err
    last = [Checkpoint(tmp_path / folder / "run" / "checkpoints" / "step-00000030") for folder in ("straight", "killed")]
    assert last[0].digest() == last[1].digest()
    log = (tmp_path / "killed" / "run" / "logs" / "rank-00000.log").read_text()
    assert "continuing from" in log and "step-000000" in log


RANK_DEPENDENT = """
import os
import torch
from torch import nn
import genscale

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.scale

def loss(network, batch, draws):
    return (network(batch["x"]) - batch["x"]).square().mean(1)

genscale.register(genscale.make_family(
    "mine", network=lambda model: Scaled(), loss=loss,
    data=lambda data, seed: genscale.MapData(torch.arange(400.0).sin().view(100, 4), validation=10, seed=seed)))

if __name__ == "__main__":
    genscale.start()
"""


@pytest.fixture
def mine(tmp_path) -> Iterator[Path]:
    """A script that registers a family, which this process knows too."""
    (tmp_path / "mine.py").write_text(RANK_DEPENDENT)
    script = FAMILIES.script
    runpy.run_path(str(tmp_path / "mine.py"))
    FAMILIES.script = str(tmp_path / "mine.py")
    yield tmp_path / "mine.py"
    FAMILIES.registered.clear()
    FAMILIES.script = script


@pytest.mark.slow
def test_a_network_drawn_anew_by_each_process_begins_alike(mine, genscale, genscale_process, tmp_path):
    """Else each process would train weights and constants of its own, without a word."""
    for steps in (4, 6):  # and goes on alike, where a checkpoint gives the weights alone
        settings = {"train.steps": steps}
        assert genscale(*words("mine", tmp_path / "1", **settings)).code == 0
        outcome = genscale_process(*words("mine", tmp_path / "2", **settings), command=group(2, str(mine)))
        assert outcome.code == 0, outcome.err
        same_run(tmp_path / "2", tmp_path / "1")


def test_a_registered_family_has_every_verb_but_a_job(mine, genscale, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {family: mine}")
    assert [line for line in genscale("families").out.splitlines() if line.startswith("mine ") and "this script" in line]
    assert genscale(*words("mine", tmp_path, **SHORT)).code == 0
    del FAMILIES.registered["mine"]  # as in another process
    message = genscale("evaluate", tmp_path / "run").message()
    assert message.endswith(f"was made by {mine}, which registers it: python {mine} VERB ...")
    runpy.run_path(str(mine))
    FAMILIES.script = str(mine)
    message = genscale("slurm", "render", "--config", tmp_path / "mine.yaml").message()
    assert message.startswith("model.family: 'mine' is known to") and "entry point genscale.families" in message
