"""Run folders, checkpoints, site and task files of somebody else's making: one line in bounded time, and no more is opened."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.writing import clear_leftovers, write_checkpoint
from genscale.cluster.job_records import submitted
from genscale.cluster.lives import read_ended
from genscale.cluster.site import read_site
from genscale.errors import UserError
from genscale.families.gpt.task_files import refuse_code
from genscale.inspection.comparison import compare_runs
from genscale.reading import Unreadable
from genscale.tracking.metrics_file import read_metrics

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghij", "bcdefghijk", strict=True))
DEEP = "[" * 100_000
TRACED = {"step": 1, "metrics": {"loss": 1.0}, "weights": {"gpt": {"w": ["aa", 1.0, 2.0]}}}


CONFIG = "model: {family: gpt}\ntrain: {precision: fp32}\n"


def run(folder: Path, *records: Any, config: str = CONFIG, trace: Any = None) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    if trace is not None:
        (folder / "trace.jsonl").write_text(json.dumps(trace) + "\n")
    return folder


# --- compare ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["text", [1, 2], {"a": {"b": 1}}, 10**400, None, 1e308, "x" * 10_000, "\x1b[31m"],
                         ids=range(8))
@pytest.mark.parametrize("name", ["loss", "learning_rate", "grad_norm"])
def test_a_metric_that_is_no_number_differs(name: str, value: Any, tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"step": 1, name: 1.0}, {"step": 2, name: 1.0})
    b = run(tmp_path / "b", {"step": 1, name: 1.0}, {"step": 2, name: value})
    for one, other in ((a, b), (b, a)):
        verdict = compare_runs(one, other).verdict
        assert verdict.startswith(f"first difference at step 2: {name.replace('_', ' ') if 'rate' in name else name} ")
        assert len(verdict) < 200 and verdict.isprintable()
    assert compare_runs(b, b).alike


@pytest.mark.parametrize("line", [DEEP, '{"step": true}', '{"step": -1}', f'{{"step": 1{"0" * 400}}}', '{"step": 1, "step": 2}',
                                  f'{{"step": 1, "loss": {"[" * 500}{"]" * 500}}}'], ids=range(6))
def test_a_line_of_metrics_that_means_harm(line: str, tmp_path: Path) -> None:
    b = run(tmp_path / "b", line, {"step": 1})
    with pytest.raises(UserError, match="metrics.jsonl: line 1 is damaged"):
        compare_runs(run(tmp_path / "a", {"step": 1}), b)


@pytest.mark.parametrize("changes", [
    {"weights": 5}, {"weights": {"gpt": 5}}, {"weights": {"gpt": {"w": 5}}}, {"weights": {"gpt": {"w": ["a", "b", "c"]}}},
    {"gradients": []}, {"gradients": ["x"]}, {"metrics": ["x"]}, {"weights": {"gpt": {"w": ["b", 10**400, 2]}}}], ids=range(8))
def test_a_trace_that_holds_something_else(changes: dict, tmp_path: Path) -> None:
    a = run(tmp_path / "a", {"step": 1}, trace=TRACED)
    b = run(tmp_path / "b", {"step": 1}, trace={**TRACED, **changes})
    with pytest.raises(UserError, match="trace.jsonl: .* of step 1 is not what genscale writes there"):
        compare_runs(a, b)


@pytest.mark.parametrize(("config", "words"), [
    (BOMB, "aliases"), (DEEP, "levels deep"), ("model: {family: gpt}\nmodel: {family: vae}\n", "'model' twice"),
    ("model: 5", "no run folder"), ("model: {family: [x]}\ntrain: {precision: fp32}", "no run folder"), ("", "no run folder")],
    ids=range(6))
def test_a_config_of_a_run_that_means_harm(config: str, words: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=words):
        compare_runs(run(tmp_path / "a", {"step": 1}), run(tmp_path / "b", {"step": 1}, config=config))
    assert time.monotonic() - started < 5


def test_a_checkpoint_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    for name in ("step-00000001", ".partial-x", ".partial-replaced-step-00000009-x"):
        os.mkfifo(tmp_path / name)
    state = {"step": 1, "data": {"batches": 0, "cursors": {}}, "scalers": {"gpt": {}}, "plan": {}}
    made = write_checkpoint(tmp_path, 1, {"networks/gpt": {"w": torch.ones(2)}}, state, "train: {}\n")
    assert made.problem() is None
    (tmp_path / ".partial-replaced-step-00000009-x").unlink()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "ended.json", "jobs/jobs.json", "site.yaml"):
        os.mkfifo(tmp_path / name)
    a = tmp_path / "a"
    with pytest.raises(UserError, match="named pipe"):
        compare_runs(run(a, {"step": 1}), tmp_path)
    with pytest.raises(UserError, match="named pipe"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="named pipe"):
        read_site(str(tmp_path / "site.yaml"))
    assert read_ended(tmp_path) is None and submitted(tmp_path) == []


@pytest.mark.parametrize(("text", "words"), [
    (BOMB, "aliases"), (DEEP, "levels deep"), ("partition: a\npartition: b\n", "'partition' twice"),
    ("partition: [", "not valid")], ids=range(4))
def test_a_site_file_that_means_harm(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"^--site: .*{words}"):
        read_site(str(tmp_path / "site.yaml"))


def test_variables_of_a_site_file_are_written_as_a_shell_has_them(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("environment: {A: true, B: yes, C: 010, D: '010', E: 1:30, F: 0.5, G: off}\n")
    assert read_site(str(tmp_path / "site.yaml")).environment == {
        "A": "true", "B": "yes", "C": "10", "D": "010", "E": "1:30", "F": "0.5", "G": "off"}


def test_task_files_that_mean_harm(tmp_path: Path) -> None:
    for text, words in ((BOMB, "aliases"), (DEEP, "levels deep"), ("task: a\ntask: b\n", "'task' twice")):
        (tmp_path / "task.yaml").write_text(text)
        with pytest.raises(Unreadable, match=words):
            refuse_code(tmp_path)


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def test_what_a_manifest_says_of_itself_hides_nothing(genscale, tmp_path: Path) -> None:
    state = {"step": 1, "data": {"batches": 0, "cursors": {}}, "scalers": {"gpt": {}}, "plan": {}}
    made = write_checkpoint(tmp_path, 1, {"networks/gpt": {"w": torch.ones(2)}}, state, "train: {checkpoint_keep_every: x}\n")
    manifest = made.manifest()
    for about in (5, {"time": 5}, {"time": "0001-01-01"}, {"versions": 5}, {"versions": {"torch": 5}}, {"strategy": "ddp"},
                  {"commit": 5}, {"position": ["x"]}, {"problem": None, "path": "elsewhere", "step": 9}):
        (made.path / "manifest.json").write_text(json.dumps({**manifest, "about": about}))
        (row,) = genscale("checkpoint", "list", tmp_path, "--json").out.splitlines()
        assert json.loads(row)["path"] == str(made.path) and json.loads(row)["step"] == 1
    (made.path / "networks" / "gpt.safetensors").write_bytes(b"x")
    assert "DAMAGED" in genscale("checkpoint", "list", tmp_path).out


@pytest.mark.parametrize("part", [
    {"guards": {"rows": 5}}, {"guards": {"batches": ["x"]}}, {"best": {"step": "x"}}, {"step": -4}, {"units": "x"},
    {"scalers": []}, {"data": {"batches": -5, "cursors": {}}}, {"evaluation": 5}], ids=range(8))
def test_a_state_that_says_something_else_is_one_line(part: dict, refuse, copied: Path) -> None:
    rewritten(copied, **part)
    assert f"{next(iter(part))} is not what genscale writes there" in refuse("--train.steps", 8)


def rewritten(run: Path, config: str | None = None, **state: Any) -> None:
    """The run with one checkpoint, whose documents say something else and are vouched for by its manifest."""
    *others, last = sorted((run / "checkpoints").iterdir())
    for path in others:
        shutil.rmtree(path)
    old = Checkpoint(last)
    tensors = {f"{kind}/gpt": {key: read(key) for key in read.keys()}  # noqa: SIM118 - no mapping
               for kind, read in ((kind, old.tensors(kind, "gpt")) for kind in ("networks", "optimizers"))}
    state, config = {**old.state(), **state}, config or (last / "config.yaml").read_text()
    shutil.rmtree(last)
    write_checkpoint(run / "checkpoints", 6, tensors, state, config)


@pytest.mark.parametrize(("before", "after", "words"), [
    ("layers: 2", "layers: 100000000", "model.layers: must be at most"), ("width: 32", "width: 131072", "would be another one"),
    ("model:", "config: /etc/hostname\nmodel:", "cannot take in another file")])
def test_the_config_of_a_checkpoint_makes_nothing_that_the_checkpoint_has_not(before, after, words, genscale, copied) -> None:
    config = (copied / "config.yaml").read_text()
    assert before in config
    rewritten(copied, config.replace(before, after))
    started = time.monotonic()
    assert words in genscale("sample", copied, "--prompt", "a", "--tokens", 2).message()
    assert time.monotonic() - started < 10
