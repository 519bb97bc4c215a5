"""Trackers against the files the real packages write, and against failures that really happen."""

from __future__ import annotations

import io
import json
import os
import pty
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from genscale.settings.config import TrackingSettings
from genscale.tracking import behind
from genscale.tracking.trackers import Trackers

CONFIG = {"train": {"steps": 100}, "model": {"family": "gpt", "width": 64}}
WANDB = TrackingSettings(wandb="offline", project="tests")
BOTH = TrackingSettings(wandb="offline", project="tests", tensorboard=True)
TENSORBOARD = TrackingSettings(wandb="disabled", tensorboard=True)


# The .wandb transaction log: LevelDB's log format with protobuf records.
BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def _wandb_records(path: Path) -> Iterator[bytes]:
    data, position, parts = path.read_bytes(), HEADER, []  # the file begins with a header of its own, of the same length
    assert data[:4] == b":W&B"
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def _read_wandb(path: Path) -> dict[str, Any]:
    """Of one offline run: its `id`, `project`, `config`, the `history` rows, the `exit_code` (None: not finished)."""
    found: dict[str, Any] = {"id": None, "project": None, "config": {}, "history": [], "exit_code": None}
    for content in _wandb_records(path):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "project": record.run.project}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append(row)
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def _rows(path) -> list[dict]:
    history = _read_wandb(path)["history"]
    return [{key: value for key, value in row.items() if key == "_step" or key[0] != "_"} for row in history]


def test_wandb_offline_holds_config_metrics_and_samples_and_a_resumed_run_keeps_its_id(tmp_path, capfd):
    trackers = Trackers(WANDB, tmp_path, CONFIG, print)
    trackers.log(10, {"loss": 1 / 3, "grad_norm": 2.0})
    trackers.log_text(10, "sample", "two <lines>\nof text")
    trackers.log_image(10, "grid", PICTURE)
    trackers.log(20, {"loss": 0.25})
    trackers.close()
    (first,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    run = _read_wandb(first)
    assert {key: run["config"][key] for key in CONFIG} == CONFIG
    assert (run["id"], run["project"], run["exit_code"]) == ((tmp_path / "wandb" / "run_id").read_text().strip(), "tests", 0)
    rows = _rows(first)
    assert [(row["_step"], row["loss"]) for row in rows] == [(10, 1 / 3), (20, 0.25)]
    assert rows[0]["grad_norm"] == 2.0
    (page,) = tmp_path.glob("wandb/offline-run-*/files/media/html/sample_10_*.html")
    assert "two &lt;lines&gt;\nof text</pre>" in page.read_text()
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/grid_10_*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), PICTURE)

    time.sleep(1)  # W&B names a folder by the second
    trackers = Trackers(WANDB, tmp_path, CONFIG | {"tracking": {"project": "tests"}}, print, first_step=20)
    trackers.log(30, {"loss": 0.125})
    trackers.close(exit_code=1)
    (second,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {first}
    resumed = _read_wandb(second)
    assert (resumed["id"], resumed["exit_code"], _rows(second)) == (run["id"], 1, [{"_step": 30, "loss": 0.125}])
    assert capfd.readouterr() == ("", "")


def test_tensorboard_holds_scalars_and_text_and_hides_what_a_resumed_run_repeats(tmp_path, capfd):
    trackers = Trackers(TENSORBOARD, tmp_path, CONFIG, print)
    trackers.begin()
    for step, loss in ((10, 4.0), (20, 3.0), (30, 99.0)):
        trackers.log(step, {"loss": loss})
    trackers.log_text(20, "sample", "two lines\nof text")
    trackers.log_image(20, "grid", PICTURE)
    trackers.close()
    trackers = Trackers(TENSORBOARD, tmp_path, CONFIG, print, first_step=20)
    trackers.log(30, {"loss": 2.0})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 4.0), (20, 3.0), (30, 2.0)]
    (sample,) = events.Tensors("sample/text_summary")
    assert (sample.step, sample.tensor_proto.string_val[0]) == (20, b"    two lines\n    of text")
    (picture,) = events.Images("grid")
    assert picture.step == 20
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))), PICTURE)
    assert capfd.readouterr() == ("", "")


def test_trackers_that_cannot_start_warn_once_each_and_the_rest_goes_on(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    warnings: list[str] = []
    trackers = Trackers(BOTH, tmp_path, CONFIG, warnings.append)
    trackers.log(1, {"loss": 1.5})
    trackers.log_text(1, "sample", "text")
    trackers.close()
    assert len(warnings) == 1
    assert warnings[0].startswith("tracking.tensorboard: stopped by an error (FileExistsError")
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert _rows(written)[0]["loss"] == 1.5

    (tmp_path / "file").write_text("")
    warnings.clear()
    trackers = Trackers(BOTH, tmp_path / "file" / "run", CONFIG, warnings.append)
    trackers.log(1, {"loss": 1.5})
    trackers.close()
    assert sorted(warning.split(":")[0] for warning in warnings) == ["tracking.tensorboard", "tracking.wandb"]


def test_disabled_trackers_leave_nothing_behind(tmp_path):
    trackers = Trackers(TrackingSettings(wandb="disabled"), tmp_path, CONFIG, print)
    trackers.begin()
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def _python(code: str, folder, stdin=None, stderr=subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess:
    # A process that used W&B hands its service to its children by a variable: these must start their own.
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | variables
    code = (
        "import sys\nfrom genscale.settings.config import TrackingSettings\nfrom genscale.tracking.trackers import Trackers\n"
        "from genscale.tracking import wandb_tracker\n"
        "def warn(line): print('WARNED', line)\n" + code
    )
    command, pipes = [sys.executable, "-c", code, str(folder)], {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr}
    done = subprocess.run(command, env=env, **pipes, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_tensorboard_that_fails_in_the_middle_warns_once(tmp_path):
    # A limit on the file's size fails its writer thread as a full disk does.
    done = _python(
        "import resource, signal, time\n"
        "from pathlib import Path\n"
        "trackers = Trackers(TrackingSettings(wandb='disabled', tensorboard=True), sys.argv[1], {}, warn)\n"
        "trackers.begin(); trackers.log(1, {'loss': 1.0})\n"
        "while not list(Path(sys.argv[1]).glob('tensorboard/*')): time.sleep(0.01)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))\n"
        "for step in range(2, 400): trackers.log(step, {'loss': 1.0}); time.sleep(0.001)\n"
        "trackers.close(); print('trained')",
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("WARNED tracking.tensorboard: ") and lines[1] == "trained"


def test_wandb_whose_service_dies_warns_once_and_does_not_hang(tmp_path):
    done = _python(
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "trackers = Trackers(TrackingSettings(wandb='offline'), sys.argv[1], {}, warn)\n"
        "import psutil\n"
        "trackers.begin(); trackers.log(1, {'loss': 1.0})\n"
        "while not list(Path(sys.argv[1]).glob('wandb/offline-run-*/*.wandb')): time.sleep(0.01)\n"
        "service = [child.pid for child in psutil.Process().children() if 'wandb' in ' '.join(child.cmdline())]\n"
        "os.kill(service[0], signal.SIGKILL)\n"
        "time.sleep(0.5)\n"
        "for step in range(2, 50): trackers.log(step, {'loss': 1.0})\n"
        "trackers.close(); print('trained')",
        tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("WARNED tracking.wandb: ") and lines[1] == "trained"
    assert done.stderr == ""


def test_wandb_holds_up_no_step_and_loses_none(tmp_path):
    """From the first step on, while it still starts; and a run that ends, or fails, before it has started."""
    done = _python(
        "import threading\nfrom pathlib import Path\n"
        "build, going = wandb_tracker.WandbTracker.__init__, threading.Event()\n"
        "def slow(*words): going.wait(); build(*words)\n"
        "wandb_tracker.WandbTracker.__init__ = slow\n"
        "folders = [Path(sys.argv[1]) / name for name in ('run', 'stopped', 'failed')]\n"
        "for folder in folders: folder.mkdir()\n"
        "first, stopped, failed = (Trackers(TrackingSettings(wandb='offline'), folder, {}, warn) for folder in folders)\n"
        "first.begin()\n"
        "line = {}\n"
        "for step in range(1, 6): line['loss'] = step / 3; first.log(step, line)\n"
        "print('wandb' in sys.modules, [*folders[0].iterdir()])\n"
        "going.set()\n"
        "for trackers, code in ((first, 0), (stopped, 0), (failed, 1)): trackers.close(code)\n",
        tmp_path,
    )
    assert (done.stdout, done.stderr) == ("False []\n", "")
    runs = {folder.name: [_read_wandb(path) for path in folder.glob("wandb/offline-run-*/*.wandb")]
            for folder in tmp_path.iterdir()}
    (run,), (failed,) = runs["run"], runs["failed"]
    assert [(row["_step"], row["loss"]) for row in run["history"]] == [(step, step / 3) for step in range(1, 6)]
    assert (run["exit_code"], failed["exit_code"], failed["history"], runs["stopped"]) == (0, 1, [], [])


def test_a_tracker_that_never_comes_back_holds_up_neither_the_run_nor_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(behind, "LONGEST", 0.2)
    for_ever, said = threading.Event(), []
    tracker = behind.Behind(for_ever.wait, lambda error, _: said.append(str(error)))
    tracker.begin()
    for _ in range(3):
        tracker.ask(lambda tracker: None)
    tracker.close(0)
    assert said == ["it did not end within 0.2 s of the run's end"]
    for_ever.set()


ONLINE = (
    "wandb_tracker.INIT_SECONDS = 2\n"
    "trackers = Trackers(TrackingSettings(wandb='online'), sys.argv[1], {}, warn)\n"
    "trackers.log(1, {'loss': 1.0}); trackers.close(); print('trained')"
)


@pytest.mark.parametrize("case", ["no credentials", "no network"])
def test_wandb_online_that_cannot_be_reached_warns_once_and_never_prompts(tmp_path, case):
    # Nothing listens on the discard port. No test here reaches out of the machine.
    variables = {"HOME": str(tmp_path / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_ERROR_REPORTING": "false"}
    if case == "no network":
        variables["WANDB_API_KEY"] = "0" * 40
    ours, theirs = pty.openpty()  # on a terminal, where it could prompt and wait for ever
    try:
        done = _python(ONLINE, tmp_path, stdin=theirs, stderr=theirs, **variables)
        os.write(theirs, b".")
        shown = os.read(ours, 4096)
    finally:
        os.close(ours)
        os.close(theirs)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("WARNED tracking.wandb: ") and lines[1] == "trained"
    assert ("API key" if case == "no credentials" else "refused") in lines[0]
    assert shown == b"."
