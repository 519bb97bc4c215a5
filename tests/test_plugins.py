"""What an installed package offers, families, data sources and hooks: a real package, installed by pip into a folder of its
own, seen by every verb."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.inspection.config_check import check_config
from genscale.settings.parser import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tests" / "plugin_package"
CONFIG = """
run: {{name: rings, dir: "{folder}"}}
model: {{family: rings, width: 8}}
data: {{radius: 2.0, workers: 0}}
train: {{steps: 4, global_batch_size: 8, log_every: 1, precision: fp32, checkpoint_every: 2}}
tracking: {{wandb: disabled}}
"""

ADDITIONS = """
run: {{name: run, dir: "{folder}"}}
model: {{family: gpt, layers: 1, heads: 1, width: 8, positions: 16}}
data: {{source: additions, options: {{most: 19}}, filters: {{even: true}}, sequence_length: 16, lanes: 4, workers: 0}}
train: {{steps: 4, global_batch_size: 8, log_every: 1, precision: fp32, checkpoint_every: 2}}
hooks: {{patience: {{every: 2, looks: 50}}}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the package is installed in."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "source")  # a build writes into it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", folder / "installed", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "installed"


@pytest.fixture
def seen(installed, monkeypatch) -> Path:
    """As `installed`, in this process."""
    monkeypatch.syspath_prepend(installed)
    return installed


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "rings.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "rings.yaml"


def test_a_packages_family_is_trained_recorded_and_named_where_it_is_missing(seen, config, tmp_path, genscale, monkeypatch):
    listed = {line.split()[0]: line for line in genscale("families").out.splitlines() if line}
    assert "genscale-rings  1.2.0" in listed["rings"] and listed["rings"].endswith("A flow that learns points on a ring")
    assert "cannot be loaded (ModuleNotFoundError: No module named 'no_such_library')" in listed["broken_rings"]
    assert "Width of the hidden layer." in genscale("train", "--model.family", "rings", "--help").out

    check_config(load_config(FAMILIES, config), 4)  # as `genscale slurm submit` does
    done = genscale("train", "--config", config)
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "rings" / "checkpoints" / "step-00000004" / "manifest.json").read_text())["about"]
    assert about["family"] == {"name": "rings", "package": "genscale-rings", "version": "1.2.0"}
    assert genscale("evaluate", tmp_path / "rings").code == 0
    manifest = tmp_path / "rings" / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"1.2.0"', '"1.1.0"'))
    other = genscale("train", "--config", config, "--train.steps", 5)
    assert "was made with package genscale-rings==1.1.0, and genscale-rings==1.2.0 is used" in other.err, other.err
    broken = genscale("train", "--config", config, "--model.family", "broken_rings").message()
    assert broken.startswith("model.family: 'broken_rings' of package genscale-rings==1.2.0 cannot be loaded (Mod")

    monkeypatch.undo()  # the package is gone
    for arguments in (["train", "--config", config, "--train.steps", 8], ["evaluate", tmp_path / "rings"]):
        message = genscale(*arguments).message()
        assert "model.family: 'rings' is not one of gpt, " in message
        assert message.endswith("was made with that of package genscale-rings==1.2.0: pip install genscale-rings==1.2.0")


@pytest.fixture
def additions(tmp_path) -> Path:
    (tmp_path / "additions.yaml").write_text(ADDITIONS.format(folder=tmp_path))
    return tmp_path / "additions.yaml"


def about(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())["about"]


def test_a_packages_data_and_hook_are_chosen_by_a_config_recorded_and_named_where_they_are_missing(
        seen, additions, tmp_path, genscale, monkeypatch):  # fmt: skip
    run = tmp_path / "run"
    listed = genscale("families").out
    assert listed.index("\ndata.source:\n") < listed.index("\nhooks:\n")
    rows = {line.split()[0]: line for line in listed.splitlines() if line}
    assert rows["additions"].endswith("1.2.0  Sums of two numbers, a shard for each first one. Settings: most, edition.")
    assert "genscale-rings" in rows["patience"] and "is no Hook" in rows["no-hook"]
    shown = genscale("data", "inspect", "--config", additions, "--blocks", 1)
    assert " = " in shown.out and shown.code == 0, shown.err

    check_config(load_config(FAMILIES, additions), 4)  # as `genscale slurm submit` does
    assert genscale("train", "--config", additions).code == 0
    origin = {"package": "genscale-rings", "version": "1.2.0"}
    assert about(run, 4)["plugins"] == {"genscale.data": {"additions": {"name": "additions", **origin}},
                                        "genscale.hooks": {"patience": {"name": "patience", **origin}}}
    assert genscale("evaluate", run).code == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["hooks"] == {"Patience": {"best": min(losses[1], losses[3]), "since": int(losses[3] >= losses[1])}}

    hooks = "{patience: {every: 1, looks: 3, by: 100}}"
    ended = genscale("train", "--config", additions, "--train.steps", 20, "--hooks", hooks)
    assert ended.code == 0, ended.err
    assert about(run, 7 - state["hooks"]["Patience"]["since"])["plugins"], "it goes on counting, and ends the run"
    other = genscale("train", "--config", additions, "--data.options", "{most: 18}").message()
    assert "data.options.most (was 19, now 18)" in other
    for hooks, wrong in (("{patiense: {}}", "hooks: 'patiense' is not one of no-hook, patience (did you mean 'patience'?)"),
                         ("{patience: {looks: 0}}", "hooks.patience.looks: must be a whole number of at least 1, not 0"),
                         ("{patience: {every: -1}}", "hooks.patience.every: must be a whole number of at least 0, not -1"),
                         ("{patience: {look: 2}}", "hooks.patience.look: unknown key (did you mean 'looks'?)"),
                         ("{patience: 3}", "hooks.patience: must be a mapping of settings like {a: 1, b: 2}, not 3"),
                         ("{no-hook: {}}", "hooks: 'no-hook' of package genscale-rings==1.2.0 is no Hook (genscale_rings.")):
        assert genscale("train", "--config", additions, "--hooks", hooks).message().startswith(wrong)

    part = genscale("train", "--config", additions, "--hooks.patience.every", 5).message()
    assert part == "--hooks.patience.every: --hooks is given as a whole, as in --hooks '{patience: {every: VALUE}}'"

    monkeypatch.undo()  # the package is gone
    install = "was made with that of package genscale-rings==1.2.0: pip install genscale-rings==1.2.0"
    again = ["train", "--config", additions, "--train.steps", 20]
    message = genscale(*again).message()
    assert message.startswith("hooks: 'patience' is not installed, ") and message.endswith(install), message
    for words in ([*again, "--hooks", "{}"], ["evaluate", run]):
        message = genscale(*words).message()
        assert message.startswith("data.source: 'additions' is not installed, ") and message.endswith(install), message


@pytest.mark.parametrize("limit", [2**20, 0], ids=["in memory", "streamed"])
def test_rows_of_a_source_are_the_samples_that_the_same_rows_in_files_are(seen, tmp_path, monkeypatch, limit):
    monkeypatch.setattr("genscale.data.text.sources.MEMORY_LIMIT", limit)
    from genscale_rings.additions import Additions

    source = Additions(most=19)
    for shard in source.shards():
        (tmp_path / f"{shard}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source.rows(shard)))
    settings = {"filters": {"even": True}, "sequence_length": 16, "lanes": 4, "shuffle_window": 8}
    ours = TextData(TextDataSettings(source="additions", options={"most": 19}, **settings), 1)
    files = TextData(TextDataSettings(source=str(tmp_path), **settings), 1)
    for lane in (0, 3):
        expected = list(islice(files.open_lane(lane), 90))  # more than an epoch
        found = list(islice(ours.open_lane(lane), 90))
        assert all(np.array_equal(one["tokens"], other["tokens"]) for (one, _), (other, _) in zip(found, expected, strict=True))
        resumed, _ = next(ours.open_lane(lane, json.loads(json.dumps(found[40][1]))))
        assert np.array_equal(resumed["tokens"], expected[41][0]["tokens"])
    assert [one["tokens"].tolist() for one in ours.validation()] == [one["tokens"].tolist() for one in files.validation()]
    same, other, later = (TextData(TextDataSettings(source="additions", options={"most": 19, **more}, **settings), 1).plan()
                          for more in ({}, {"most": 18}, {"edition": "2"}))
    assert same == ours.plan() and other["source_content"] != same["source_content"]
    assert limit or later["source_fingerprint"] != same["source_fingerprint"]


@pytest.mark.parametrize("limit", [2**20, 0], ids=["in memory", "streamed"])
def test_pictures_of_a_source_are_those_of_the_same_rows_in_parquet(seen, tmp_path, monkeypatch, limit):
    monkeypatch.setattr("genscale.data.images.sources.MEMORY_LIMIT", limit)
    from genscale_rings.dots import Dots

    for part in ("", "-validation"):
        for side in ("left", "right"):
            pq.write_table(pa.Table.from_pylist(list(Dots().rows(side + part))), tmp_path / f"{side}{part}.parquet")
    paths = {part: [str(tmp_path / f"{side}{part}.parquet") for side in ("left", "right")] for part in ("", "-validation")}
    settings = {"size": 8, "channels": 1, "labels": True, "lanes": 2, "class_names": ["left", "right"], "window": 4}
    ours = ImageData(ImageDataSettings(source="dots", **settings), 1)
    files = ImageData(ImageDataSettings(source=paths[""], validation_source=paths["-validation"], **settings), 1)
    for lane in (0, 1):
        for (one, _), (other, _) in zip(islice(ours.open_lane(lane), 70), files.open_lane(lane), strict=False):
            assert np.array_equal(one["image"], other["image"]) and one["label"] == other["label"]
    assert len(ours.validation()) == 16 and ours.classes == ["left", "right"]
    assert {int(one["image"].max()) for one in ours.validation()} == {255}


@pytest.mark.parametrize(("settings", "refused"), [
    ({"options": {"mots": 9}}, "data.options.mots: unknown key (did you mean 'most'?); the settings are most, edition"),
    ({"options": {"most": 0}}, "data.options.most: must be a whole number of at least 1, not 0"),
    ({"column": "txt"}, "data.column=txt: shard 'additions-000' of data.source=additions has the columns text, even"),
    ({"source": "adition", "options": {}},
     "data.options: {} are for a source of an installed package (data.source: 'adition' is not one of additions, dots, drawn "
     "(did you mean 'additions'?))"),
    ({"source": "python-docs", "options": {"most": 9}}, "data.options: {'most': 9} are for a source of an installed package"),
    ({"source": "drawn"}, "data.source: 'drawn' of package genscale-rings==1.2.0 has other rows whenever shard 'all' is read"),
])  # fmt: skip
def test_what_is_wrong_with_a_source_is_said_in_a_line(seen, tmp_path, monkeypatch, settings, refused):
    with pytest.raises(UserError) as error:
        TextData(TextDataSettings(**{"source": "additions", **settings}), 1)
    assert str(error.value).startswith(refused)


def test_a_path_of_the_same_name_is_not_taken_for_the_source(seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "additions").mkdir()
    with pytest.raises(UserError, match="and a path here; give ./additions for the path"):
        TextData(TextDataSettings(source="additions"), 1)


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_with_are_the_undisturbed_run(
        installed, additions, tmp_path, genscale_group, genscale_start, genscale_finish, genscale):  # fmt: skip
    path = f"{ROOT}:{installed}"
    words = ["train", "--config", additions, "--train.steps", 60, "--train.checkpoint_every", 5, "--data.workers", 1]
    running = genscale_start(*words, "--processes", 2, PYTHONPATH=path)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 13:
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    launcher = psutil.Process(running.pid)
    for each in [launcher, *launcher.children(recursive=True)]:
        each.kill()
    genscale_finish(running)
    done = genscale_group(*words, PYTHONPATH=path)
    assert done.code == 0 and "continuing from" in done.err, done.err
    undisturbed = genscale_group(*words, "--run.name", "undisturbed", PYTHONPATH=path)
    assert undisturbed.code == 0, undisturbed.err
    digests = [genscale("checkpoint", "digest", tmp_path / name).out for name in ("run", "undisturbed")]
    assert digests[0] == digests[1] != ""
    assert json.loads((tmp_path / "run/checkpoints/step-00000060/state.json").read_text())["hooks"]["Patience"]["best"] < 10


@pytest.mark.slow
def test_the_processes_of_a_run_see_it(installed, config, tmp_path, genscale_process):
    path = f"{ROOT}:{installed}"
    done = genscale_process("train", "--processes", 2, "--config", config, PYTHONPATH=path)
    assert done.code == 0, done.err
    again = genscale_process("train", "--processes", 2, "--config", config, "--train.steps", 6, "--parallel.strategy", "fsdp2",
                             PYTHONPATH=path)
    assert again.code == 0 and "continuing from" in again.err + again.out, again.err
