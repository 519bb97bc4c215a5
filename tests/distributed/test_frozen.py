"""Frozen networks and rollouts: a toy whose student learns from a frozen teacher where its own rollouts lead, whose lengths
differ by process, is the same run under every strategy; checkpoints hold nothing of the teacher but its digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.objectives.base import Phase, check_networks
from genscale.testing.runs import Run, flags

SHARDED = ("zero3", "fsdp2")
WHOLE_TEACHER = 4 * (3 * 128 + 129 * 128 + 2 * 128 + 129 * 2)
"""Bytes of its parameters."""
Runs = dict[str, dict[str, Any]]
Train = Callable[..., Any]


@pytest.fixture(scope="module")
def toy(frozen_worker: ModuleType) -> Iterator[ModuleType]:
    """The worker, with its toy among the families of this process."""
    frozen_worker.plant()
    yield frozen_worker
    del FAMILIES.registered["toy"]


@pytest.fixture
def train(toy: ModuleType, genscale: Train, tmp_path: Path) -> Iterator[Train]:
    """`train("name", **settings)`: a run in this process, in `<tmp_path>/<name>`."""

    def run(name: str, *verb: str, **settings: Any) -> Any:
        settings = {**toy.SETTINGS, "run.dir": tmp_path, "run.name": name, **settings}
        return genscale("train", *verb, *flags(settings))

    yield run
    toy.Distilled.teacher_is_gone = False


@pytest.fixture(scope="module")
def alone(toy: ModuleType, genscale: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run in one process. To be read only."""
    folder = tmp_path_factory.mktemp("alone")
    settings = {**toy.SETTINGS, "run.dir": folder, "run.name": "toy"}
    done = genscale("train", *flags(settings))
    assert done.code == 0, done.err
    return folder / "toy"


@pytest.fixture
def cut(alone: Path, tmp_path: Path, toy: ModuleType) -> Path:
    """A copy of it as a kill after step 3 leaves it, when nobody can give the teacher's weights any more."""
    copy = tmp_path / "toy"
    shutil.copytree(alone, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    toy.Distilled.teacher_is_gone = True
    return copy


def check(runs: Runs, strategy: str, alone: Path, toy: ModuleType, difference: Callable[..., float],
          share: float = 0.6) -> None:
    run = runs[strategy]
    assert difference(run["numbers"], toy.numbers(Run(alone))) < 1e-5
    assert run["calls"][0] != run["calls"][1]  # the processes called the student's rollouts differently often
    assert run["frozen"] == Run(alone).latest().state()["frozen"]
    assert run["optimizers"] == run["averages"] == ["student"]
    assert run["files"] and not [file for file in run["files"] if "teacher" in file]
    for held in run["bytes"]:
        assert held < share * WHOLE_TEACHER if strategy in SHARDED else held == WHOLE_TEACHER


def variants_of(strategy: str) -> Runs:
    settings = {"parallel.strategy": strategy}
    return {strategy: {"settings": settings}, f"{strategy}-again": {"again_from": [strategy, 3], "settings": settings}}


def test_a_frozen_teacher_and_uneven_rollouts_under_fsdp2(frozen_runs: Any, alone: Path, toy: Any, difference: Any) -> None:
    check(frozen_runs({"fsdp2": variants_of("fsdp2")["fsdp2"]}), "fsdp2", alone, toy, difference)


@pytest.mark.slow
def test_a_frozen_teacher_and_uneven_rollouts(frozen_runs: Any, alone: Path, toy: Any, difference: Any) -> None:
    strategies = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    runs = frozen_runs({name: variant for each in strategies for name, variant in variants_of(each).items()})
    for strategy in strategies:
        check(runs, strategy, alone, toy, difference)
        assert runs[f"{strategy}-again"]["digest"] == runs[strategy]["digest"]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(("strategy", "share"), [("fsdp2", 0.6), ("zero3", 0.76)])
def test_a_frozen_teacher_and_uneven_rollouts_in_groups(strategy: str, share: float, frozen_runs: Any, alone: Path, toy: Any,
                                                       difference: Any) -> None:
    """ZeRO-3 holds a quarter of the teacher, and a half as the second copy, which lasts as the teacher does."""
    settings = {"parallel.strategy": strategy, "parallel.shard_size": 2}
    variants = {name: {**variant, "settings": settings} for name, variant in variants_of(strategy).items()}
    runs = frozen_runs(variants, processes=4)
    check(runs, strategy, alone, toy, difference, share)
    assert runs[f"{strategy}-again"]["digest"] == runs[strategy]["digest"]


@pytest.mark.slow
def test_where_a_network_does_not_fit_whole_all_processes_call_it_alike(frozen_runs: Any, alone: Path, toy: Any,
                                                                       difference: Any) -> None:
    runs = frozen_runs({strategy: {"fits": False, "settings": {"parallel.strategy": strategy}} for strategy in SHARDED}
                       | {"copies": {"fits": False, "settings": {"parallel.strategy": "zero3", "parallel.shard_size": 1}}})
    for run in runs.values():
        assert difference(run["numbers"], toy.numbers(Run(alone))) < 1e-5
        assert run["calls"][0] == run["calls"][1]


@pytest.mark.slow
def test_rollouts_in_bf16(frozen_runs: Any, alone: Path, toy: Any, difference: Any) -> None:
    runs = frozen_runs({strategy: {"settings": {"parallel.strategy": strategy, "train.precision": "bf16"}}
                        for strategy in ("ddp", "zero2", "zero3", "fsdp2")})
    for run in runs.values():
        assert difference(run["numbers"], toy.numbers(Run(alone))) < 0.1


def test_micro_batches_do_not_matter(train: Train, alone: Path, toy: Any, tmp_path: Path, difference: Any) -> None:
    assert train("accumulated", **{"train.micro_batch_size": 4}).code == 0
    found, true = (toy.numbers(Run(run)) for run in (tmp_path / "accumulated", alone))
    assert difference(found, true) < 1e-5


def test_a_resumed_run_needs_the_copy_alone(cut: Path, train: Train, alone: Path, toy: Any, genscale: Train) -> None:
    assert train("toy").code == 0
    assert Run(cut).latest().digest() == Run(alone).latest().digest()
    assert json.loads(genscale("evaluate", cut).out)["loss"] == Run(cut).values("validation_loss")[-1]
    assert genscale("checkpoint", "verify", cut).code == 0
    toy.Distilled.teacher_is_gone = False
    table = train("toy", "--audit=2").out
    assert "no leak, no dead term" in table and "frozen" in table


def test_a_wrong_or_missing_copy_is_named(cut: Path, train: Train, genscale: Train) -> None:
    copy = cut / "frozen" / "teacher.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    for outcome in (train("toy"), genscale("evaluate", cut), genscale("checkpoint", "verify", cut)):
        message = outcome.message_of_run()
        assert message.startswith(f"{copy}: it is not the network teacher (from the school of Athens) that")
    copy.unlink()
    for outcome in (train("toy"), genscale("evaluate", cut), genscale("checkpoint", "verify", cut)):
        assert outcome.message_of_run().startswith(f"{copy}: missing; it is the frozen network teacher")


def test_another_teacher_is_another_run(alone: Path, tmp_path: Path, genscale: Train) -> None:
    other = tmp_path / "other"
    shutil.copytree(alone, other)
    for checkpoint in find_checkpoints(other):
        state = json.loads((checkpoint.path / "state.json").read_text())
        state["frozen"]["teacher"]["sha256"] = "0" * 64
        rewrite(checkpoint, "state.json", json.dumps(state).encode())
    assert Run(other).latest().problem() is None and Run(other).latest().digest() != Run(alone).latest().digest()
    (other / "trace.jsonl").unlink()
    assert "teacher" in genscale("compare", alone, other).out


def rewrite(checkpoint: Checkpoint, name: str, content: bytes) -> None:
    """Give a file of a checkpoint other contents, for which its manifest vouches."""
    from hashlib import sha256

    (checkpoint.path / name).write_bytes(content)
    manifest = checkpoint.manifest()
    manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))


def test_no_optimizer_steps_a_frozen_network(train: Train) -> None:
    message = train("lr", **{"optimizer.lr_of": "{teacher: 0.1}"}).message()
    assert message.startswith("optimizer.lr_of: teacher is frozen")


@pytest.mark.parametrize(("changed", "words"), [
    ({"frozen": {}}, "Objective.networks: no phase of Distilled trains teacher; declare it in Objective.frozen"),
    ({"frozen": {"teacher": "", "judge": ""}}, "Objective.frozen: judge is no network of Distilled"),
    ({"averaged": ("teacher",)}, "Objective.averaged: teacher is declared frozen"),
    ({"phases": ["student", "teacher"]}, "phase teacher: it trains teacher, which Objective.frozen"),
    ({"phases": ["student", "judge"]}, "phase judge: judge is no network of Distilled"),
])  # fmt: skip
def test_every_network_is_trained_or_frozen(changed: Mapping[str, Any], words: str, toy: ModuleType) -> None:
    objective = toy.Distilled()
    check_networks(objective)
    for key, value in changed.items():
        phases = [Phase(name, name, objective.terms, len) for name in value] if key == "phases" else value
        setattr(objective, key, phases)
    with pytest.raises(UserError, match="^" + words.replace("(", r"\(")):
        check_networks(objective)
