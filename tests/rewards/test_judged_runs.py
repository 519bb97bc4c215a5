"""Runs that are judged: what goes wrong with a judge, what a config may not do, and the end of a run that was interrupted."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import yaml

import genscale as library
from genscale.families import FAMILIES

SCRIPT = Path(__file__).with_name("judged_run.py")
ANY = [{"name": "mine", "weight": 2}, {"name": "length", "target": 80, "weight": 0.1}]


@pytest.fixture
def judged(monkeypatch) -> ModuleType:
    """The script, whose family is known here."""
    spec = importlib.util.spec_from_file_location("judged_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "judged_run", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES.registered, "judged", module.FAMILY)
    return module


@pytest.fixture
def train(judged, tmp_path) -> Callable[..., Path]:
    """Trains in this process, in a folder of that name; gives the run folder."""

    def run(name: str, steps: int = 6, **settings: Any) -> Path:
        config = judged.config_of(str(tmp_path / name), ANY, steps, **{"schedule.name": "constant", **settings})
        return library.train(config, rewards={"mine": judged.mine}).folder

    return run


@pytest.fixture
def refused(genscale, judged, tmp_path) -> Callable[..., str]:
    """The one line that `genscale train` refuses a config with these rewards with, before a step."""

    def run(rewards: object) -> str:
        content = {"run": {"dir": str(tmp_path), "name": "no"}, "model": {"family": "judged", "width": 8},
                   "objective": {"rewards": rewards}, "tracking": {"wandb": "disabled"},
                   "train": {"steps": 2, "global_batch_size": 4, "precision": "fp32"}}
        (tmp_path / "no.yaml").write_text(yaml.safe_dump(content))
        done = genscale("train", "--config", tmp_path / "no.yaml")
        metrics = tmp_path / "no" / "metrics.jsonl"
        assert not metrics.exists() or "loss" not in metrics.read_text()
        return done.message_of_run()

    return run


def digest(genscale, run: Path) -> str:
    return genscale("checkpoint", "digest", run).out


def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(train, genscale, judged):
    """Judged by dice: only what was written down can make the ends equal."""
    folder = train("first", 3)
    shutil.rmtree(folder / "checkpoints" / "step-00000003")  # as one that was killed after its third step
    lines = (folder / "rewards-00000.jsonl").read_text()
    assert train("first", 6) == folder
    whole = (folder / "rewards-00000.jsonl").read_text()
    assert whole.startswith(lines)
    records = [json.loads(line) for line in whole.splitlines()]
    assert len({(each["step"], each["sample"]) for each in records}) == len(records) == 24, "nothing was asked for twice"
    (folder.parents[1] / "anew" / "judged").mkdir(parents=True)
    shutil.copy(folder / "rewards-00000.jsonl", folder.parents[1] / "anew" / "judged")
    anew = train("anew", 6)
    assert (anew / "rewards-00000.jsonl").read_text() == whole
    assert digest(genscale, anew) == digest(genscale, folder)
    other = train("other", 6)
    assert digest(genscale, other) != digest(genscale, folder), "dice fall otherwise"


def test_the_resolved_config_has_the_defaults_and_the_checkpoint_says_whose_reward_it_is(train):
    folder = train("run", 1)
    written = yaml.safe_load((folder / "config.yaml").read_text())["objective"]["rewards"]
    assert written[1] == {"name": "length", "weight": 0.1, "target": 80, "tolerance": 0, "unit": "characters"}
    about = json.loads((folder / "checkpoints" / "step-00000001" / "manifest.json").read_text())["about"]
    assert about["plugins"]["genscale.rewards"]["mine"]["name"] == "mine"


def test_defaults_of_a_scripts_own_class_stand_in_the_resolved_config_too(judged, tmp_path):
    config = judged.config_of(str(tmp_path), [{"name": "wordy"}], 1)
    assert config.objective.rewards == [{"name": "wordy", "weight": 1.0}]
    folder = library.train(config, rewards={"wordy": judged.Wordy}).folder
    written = yaml.safe_load((folder / "config.yaml").read_text())["objective"]["rewards"]
    assert written == [{"name": "wordy", "weight": 1.0, "most": 5}]
    assert not list(folder.glob("rewards-*")), "a class is repeatable unless it says otherwise"


@pytest.mark.parametrize(("fault", "why"), [("nan", "gave nan, for number 1 of 4"), ("error", "KeyError: 'no such judge' in")])
def test_a_judge_that_fails_ends_the_run_by_name(train, judged, tmp_path, monkeypatch, fault, why):
    monkeypatch.setenv("MINE", fault)
    with pytest.raises(library.UserError, match=rf"objective.rewards\[0\] \(mine\): {why}.*; asked 3 times"):
        train("run", 2)
    ended = json.loads((tmp_path / "run" / "judged" / "ended.json").read_text())
    assert (ended["how"], ended["exit_code"]) == ("failed", 2) and why in ended["reason"]


def test_a_config_names_no_code_no_file_and_no_program(refused, tmp_path, monkeypatch):
    monkeypatch.delenv("GENSCALE_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    for name in ("own", "own:reward", "./own.py", "os.system", "texts:Exact", "__import__('os')"):
        assert f"objective.rewards[0].name: '{name}' is not one of exact, " in refused([{"name": name}])
    assert "class_path: 'os.system': a config cannot name code" in refused([{"class_path": "os.system"}])
    assert "class_path" in refused([{"name": "json", "schema": {"class_path": "own", "init_args": {}}}])
    for setting in ("command", "module", "function", "path"):
        assert f"objective.rewards[0].{setting}: unknown key" in refused([{"name": "exact", setting: "/bin/sh"}])
    assert "rewards[0].program: '/bin/sh' is none that this site allows" in refused([{"name": "program", "program": "/bin/sh"}])
    assert "rewards[0].url: http://127.0.0.1:9/ is none that this site allows" in \
        refused([{"name": "http", "url": "http://127.0.0.1:9/"}])
    assert "rewards[0].run: there is no run folder /etc/shadow" in refused([{"name": "likelihood", "run": "/etc/shadow"}])
    assert not (tmp_path / "was-run").exists()


def test_a_pattern_that_backtracks_for_ever_ends_the_run_by_name(refused):
    pattern = "(?:[0-9. -]|[0-9. -]{2})+(?<=z)"
    message = refused([{"name": "exact"}, {"name": "regex", "pattern": pattern, "seconds": 0.2}])
    assert f"objective.rewards[1] (regex): pattern: '{pattern}' took more than 0.2 seconds" in message


@pytest.mark.slow
def test_killed_on_two_processes_and_gone_on_with_on_one(genscale, genscale_start, genscale_finish, tmp_path):
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT))
    words = [tmp_path / "killed", json.dumps(ANY), 8]
    process = genscale_start(*words, command=launch, MINE="slow")
    folder = tmp_path / "killed" / "judged"
    deadline = time.monotonic() + 100
    while not _steps(folder) >= {5} and time.monotonic() < deadline:  # one after a checkpoint
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGKILL)
    genscale_finish(process)
    assert sorted(path.name for path in folder.glob("rewards-*")) == ["rewards-00000.jsonl", "rewards-00001.jsonl"]
    done = genscale_finish(genscale_start(*words, command=(sys.executable, str(SCRIPT))))
    assert done.code == 0, done.err
    said = [json.loads(line) for path in folder.glob("rewards-*") for line in path.read_text().splitlines()]
    assert len({(each["step"], each["sample"]) for each in said}) == len(said) == 32, "nothing was asked for twice"


def _steps(folder: Path) -> set[int]:
    found = set()
    for path in folder.glob("rewards-*"):
        found |= {json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")}
    return found


@pytest.mark.slow
def test_a_judge_that_hangs_ends_the_run_by_the_watchdog(genscale_process, tmp_path):
    done = genscale_process(tmp_path, json.dumps(ANY), 4, "guards.hang_minutes=0.05", command=(sys.executable, str(SCRIPT)),
                            MINE="hang")
    assert done.code == 75 and "step 1, reward mine" in done.err and "judged_run.py" in done.err, done.err
