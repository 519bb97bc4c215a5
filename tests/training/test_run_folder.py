"""The run folder: a name cannot leave run.dir, an earlier run is never lost, and only an equal config continues."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints
from genscale.checkpoint.writing import write_checkpoint
from genscale.data.text.data import TextDataSettings
from genscale.errors import UserError
from genscale.families.gpt.network import GPTSettings
from genscale.settings.config import Config, RunSettings, TrainSettings
from genscale.supervise.run_folder import (
    check_free_space,
    check_host_memory,
    check_may_continue,
    config_dict,
    config_yaml,
    create_run_folder,
    find_resume_point,
    flatten,
    run_folder,
    set_later_checkpoints_aside,
)

PLAN = {"seed": 1337, "source_digest": "abc"}


def config() -> Config:
    return Config(model=GPTSettings(), data=TextDataSettings())


def checkpoint(folder: Path, step: int = 10) -> Checkpoint:
    state = {"step": step, "data": {"batches": 0, "cursors": {}}, "scalers": {}, "plan": PLAN}
    tensors = {"networks/gpt": {"w": torch.full((2,), step)}}
    return write_checkpoint(folder / "checkpoints", step, tensors, state, config_yaml(config()))


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/b", "/etc", "a/", "a/../b", "./a"])
def test_a_name_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"run.name: '{name}' must be a plain folder name"):
        run_folder(RunSettings(name=name, dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["a", "gpt2-124m", "a b", "..a", "ä.1"])
def test_plain_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_folder(RunSettings(name=name, dir=str(tmp_path))) == tmp_path / name
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell expands ~, but a YAML file has no shell
    assert run_folder(RunSettings(name=name, dir="~/runs")) == tmp_path / "runs" / name


def test_the_config_file_means_the_config() -> None:
    whole = config()
    read = yaml.safe_load(config_yaml(whole))
    assert read == config_dict(whole) and read["optimizer"]["betas"] == [0.9, 0.95] and read["model"]["width"] == 384
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2]}


# --- what may change -------------------------------------------------------------------------------------------------

MAY = {"run.name": "other", "run.dir": "elsewhere", "run.resume": "never", "parallel.strategy": "fsdp2",
       "parallel.compile": True, "tracking.wandb": "disabled", "train.log_every": 3,
       "train.evaluate_every": 7, "train.sample_every": 8,
       "train.checkpoint_every": 9, "train.checkpoint_keep": 9, "train.micro_batch_size": 2, "train.steps": 2000,
       "data.workers": 2, "data.prefetch_steps": 5,
       "data.cache": "cache", "model.loss_chunk": 512}
MUST_NOT = {"run.seed": 1, "model.layers": 7, "data.source": "other.txt", "data.sequence_length": 128,
            "train.global_batch_size": 64, "train.precision": "bf16", "train.clip": 0.5, "optimizer.lr": 1.0,
            "optimizer.betas": (0.9, 0.99), "schedule.warmup_steps": 5}


def with_setting(key: str, value: Any, of: Config | None = None) -> Config:
    changed = of or config()
    section, name = key.split(".")
    assert getattr(getattr(changed, section), name) != value
    return replace(changed, **{section: replace(getattr(changed, section), **{name: value})})


@pytest.mark.parametrize("key", MAY)
def test_what_computes_the_same_may_change(key: str, tmp_path: Path) -> None:
    before = checkpoint(tmp_path)
    assert check_may_continue(config(), before, PLAN) == []
    (line,) = check_may_continue(with_setting(key, MAY[key]), before, PLAN)
    assert line.startswith(f"{key}: ") and line.endswith(f"-> {MAY[key]!r}")


def test_a_setting_that_the_checkpoint_never_heard_of_had_its_default(tmp_path: Path) -> None:
    before = checkpoint(tmp_path)
    file = before.path / "config.yaml"
    known = yaml.safe_load(file.read_text())
    del known["model"]["dropout"]
    file.write_text(yaml.safe_dump(known))
    assert check_may_continue(config(), before, PLAN) == []
    with pytest.raises(UserError, match=r"model.dropout \(was 0.0, now 0.1\)"):
        check_may_continue(with_setting("model.dropout", 0.1), before, PLAN)


@pytest.mark.parametrize("key", MUST_NOT)
def test_what_computes_otherwise_must_not(key: str, tmp_path: Path) -> None:
    before = checkpoint(tmp_path)
    changed = with_setting(key, MUST_NOT[key], with_setting("train.log_every", 3))
    value = MUST_NOT[key]
    with pytest.raises(UserError) as refused:
        check_may_continue(changed, before, PLAN)
    message = str(refused.value)
    assert f"{key} (was " in message and f"now {list(value) if isinstance(value, tuple) else value!r})" in message
    assert "train.log_every" not in message


def test_every_difference_is_named(tmp_path: Path) -> None:
    changed = with_setting("model.layers", 7, with_setting("optimizer.lr", 0.5))
    with pytest.raises(UserError, match=r"model.layers \(was 6, now 7\), optimizer.lr \(was 0.0003, now 0.5\)"):
        check_may_continue(changed, checkpoint(tmp_path), PLAN)


def test_other_data_under_the_same_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the data is not what the checkpoint .* source_digest \(was 'abc', now 'abd'\)"):
        check_may_continue(config(), checkpoint(tmp_path), {**PLAN, "source_digest": "abd"})


# --- where a run starts ----------------------------------------------------------------------------------------------

def test_auto_takes_the_latest_valid(tmp_path: Path) -> None:
    create_run_folder(tmp_path)
    warnings: list[str] = []
    assert find_resume_point(tmp_path, "auto", warnings.append) is None and not warnings
    first, second = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert find_resume_point(tmp_path, "auto", warnings.append) == second and not warnings
    (second.path / "state.json").unlink()
    assert find_resume_point(tmp_path, "auto", warnings.append) == first and str(second.path) in warnings[0]
    (first.path / "state.json").unlink()
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        find_resume_point(tmp_path, "auto", warnings.append)


def test_a_path_must_be_a_whole_checkpoint(tmp_path: Path) -> None:
    chosen = checkpoint(tmp_path, 10)
    assert find_resume_point(tmp_path, str(chosen.path), print) == chosen
    with pytest.raises(UserError, match=r"run.resume: 'latest' is not a checkpoint folder; use auto, never, or a path"):
        find_resume_point(tmp_path, "latest", print)
    (chosen.path / "config.yaml").unlink()
    with pytest.raises(UserError, match="is damaged .config.yaml is missing."):
        find_resume_point(tmp_path, str(chosen.path), print)


def test_never_moves_the_earlier_run_aside_whole(tmp_path: Path) -> None:
    create_run_folder(tmp_path)
    before = checkpoint(tmp_path).digest()
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "logs" / "rank-0.log").write_text("this very start\n")
    warnings: list[str] = []
    assert find_resume_point(tmp_path, "never", warnings.append) is None
    (aside,) = tmp_path.glob("previous-*")
    assert str(aside) in warnings[0]
    (moved,) = list_checkpoints(aside / "checkpoints")
    assert moved.digest() == before and (aside / "metrics.jsonl").exists()
    assert not list_checkpoints(tmp_path / "checkpoints") and not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "samples").is_dir() and (tmp_path / "logs" / "rank-0.log").exists()
    assert find_resume_point(tmp_path, "never", warnings.append) is None
    assert list(tmp_path.glob("previous-*")) == [aside] and len(warnings) == 1, "nothing was there to move"


def test_later_checkpoints_are_set_aside_whole(tmp_path: Path) -> None:
    found = {step: checkpoint(tmp_path, step).digest() for step in (10, 20, 30)}
    warnings: list[str] = []
    set_later_checkpoints_aside(tmp_path, 30, warnings.append)
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 3 and not warnings
    set_later_checkpoints_aside(tmp_path, 10, warnings.append)
    (aside,) = tmp_path.glob("previous-*")
    assert str(aside) in warnings[0]
    assert {each.step: each.digest() for each in list_checkpoints(tmp_path / "checkpoints")} == {10: found[10]}
    assert {each.step: each.digest() for each in list_checkpoints(aside / "checkpoints")} == {20: found[20], 30: found[30]}


def test_set_aside_twice_in_a_second_and_in_another_time_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for zone in ("Asia/Tokyo", "Asia/Tokyo", "America/Lima"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            checkpoint(tmp_path, 20)
            set_later_checkpoints_aside(tmp_path, 10, lambda line: None)
    finally:
        monkeypatch.undo()
        time.tzset()
    asides = sorted(tmp_path.glob("previous-*"))
    assert [len(list_checkpoints(aside / "checkpoints")) for aside in asides] == [1, 1, 1]
    stamps = [datetime.strptime(aside.name.split("-")[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC) for aside in asides]
    assert all(abs((datetime.now(UTC) - stamp).total_seconds()) < 60 for stamp in stamps)


def test_a_run_taken_up_from_an_earlier_checkpoint_keeps_what_it_writes(
        genscale: Callable[..., Any], tiny_config: Path, tiny_run: Path) -> None:
    """Neither pruned in favour of the checkpoints it left behind, nor continued from one of them."""
    assert genscale("train", "--config", tiny_config).code == 0
    straight = {each.step: each.digest() for each in list_checkpoints(tiny_run / "checkpoints")}
    assert list(straight) == [2, 4, 6]
    again = genscale("train", "--config", tiny_config, "--run.resume", tiny_run / "checkpoints" / "step-00000002",
                     "--train.checkpoint_keep", 1)
    assert again.code == 0, again.err
    assert {each.step: each.digest() for each in list_checkpoints(tiny_run / "checkpoints")} == {6: straight[6]}
    (aside,) = tiny_run.glob("previous-*")
    assert [each.step for each in list_checkpoints(aside / "checkpoints")] == [4, 6]
    steps = [json.loads(line)["step"] for line in (tiny_run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4, 5, 6]


# --- the disk --------------------------------------------------------------------------------------------------------

def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run.dir: cannot write to .*file/run \(Not a directory\)"):
        create_run_folder(tmp_path / "file" / "run")


def test_checkpoints_that_cannot_fit(tmp_path: Path) -> None:
    create_run_folder(tmp_path)
    check_host_memory(1000)
    with pytest.raises(UserError, match=r"^model: a checkpoint of 1,000,000,000,000 parameters is collected in 11,176 GiB of "):
        check_host_memory(10**12)
    train, said = TrainSettings(steps=10**9, checkpoint_every=10, checkpoint_keep_every=10**8), []
    check_free_space(tmp_path, 1000, 0, train, said.append)
    with pytest.raises(UserError, match=r"disk full: .* MiB free, checkpoints need 45,776,368 MiB; .*checkpoint_keep \(3\)"):
        check_free_space(tmp_path, 10**12, 0, train, said.append)
    with pytest.raises(UserError, match="disk full"):
        check_free_space(tmp_path, 1000, 10**13, train, said.append)
    assert said == []
    # Those that are kept for ever may be moved away meanwhile.
    train = replace(train, checkpoint_keep_every=4)
    check_free_space(tmp_path, 10**6, 0, train, said.append)
    (line,) = said
    assert line.startswith("train.checkpoint_keep_every: 4 keeps 50,000,000 more checkpoints for ever (572,204,590 MiB), and ")
    least = int(line.removesuffix(" or more").rsplit(" ", 1)[1].replace(",", ""))
    train = replace(train, checkpoint_keep_every=-(-least // 10) * 10)
    check_free_space(tmp_path, 10**6, 0, train, said.append)
    assert len(said) == 1
    with pytest.raises(UserError, match="GiB"):
        check_host_memory(1000, averages=10**13)
