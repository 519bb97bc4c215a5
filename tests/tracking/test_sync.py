"""`genscale sync`: W&B's own files of a run that was killed and went on, uploaded to a server by W&B's own program."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from genscale.tracking.metrics_file import read_metrics
from genscale.tracking.wandb_lives import Uploaded, join_lives
from genscale.tracking.wandb_log import read_records, write_records

# A life of a run: it goes on from step `done`, logs up to step `last`, with a sample each fourth step, and then ends well or is
# killed. Life number n logs a loss of step + n / 10.
LIFE = """
import logging, os, psutil, signal, sys, time
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from genscale.settings.config import Config, RunSettings, TrackingSettings
from genscale.tracking.run_record import RunRecord
from genscale.tracking.writes import Writes
folder, number, done, last, how = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
(folder / "plots").mkdir(parents=True, exist_ok=True)
config = Config(run=RunSettings(name="tiny"), tracking=TrackingSettings(wandb="offline"))
record = RunRecord(folder, config, {"life": number}, "tokens", done, Writes(print))
for step in range(done + 1, last + 1):
    record.step(step)
    record.write(step, {"loss": step + number / 10, "data_digest": 7})
    if step % 4 == 0:
        record.sample(step, folder / "sample.txt", f"life {number}, step {step}")
        record.write(step, {"validation_loss": step / 2})
if how == "killed":
    while not list(folder.glob(f"wandb/offline-run-*/files/media/html/sample_{last // 4 * 4}_*.html")):  # it works behind
        time.sleep(0.01)
    for pid in [*(child.pid for child in psutil.Process().children()), os.getpid()]:
        os.kill(pid, signal.SIGKILL)
record.close(failed=False, loss_unit="nats")
"""


def live(folder: Path, number: int, done: int, last: int, how: str = "well", **variables: str) -> None:
    command = [sys.executable, "-c", LIFE, str(folder), str(number), str(done), str(last), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == (-9 if how == "killed" else 0), ended.stderr
    assert f"W&B is offline: `genscale sync {folder}` uploads the run" in ended.stderr


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after two lives: the first was killed at step 9, the second went on from 6 and ended at 13."""
    folder = tmp_path_factory.mktemp("lived") / "tiny"
    live(folder, 1, 0, 9, "killed")
    live(folder, 2, 6, 13)
    return folder


def losses(last: int, *, of: dict[int, int]) -> dict[int, float]:
    """By step, where life n made the steps from of[n] on."""
    return {step: step + max(n for n, first in of.items() if first <= step) / 10 for step in range(1, last + 1)}


def numbers(row: dict[tuple[str, ...], str], key: str) -> float:
    return float(json.loads(row[(key,)]))


def test_two_lives_come_to_each_step_once(lived):
    assert len(list(lived.glob("wandb/offline-run-*"))) == 2
    joined = join_lives(lived)
    rows = dict(sorted(joined.rows.items()))
    assert {step: numbers(row, "loss") for step, row in rows.items()} == losses(13, of={1: 1, 2: 7})
    assert [step for step, row in rows.items() if ("validation_loss",) in row] == [4, 8, 12]
    assert not any(("data_digest",) in row for row in rows.values())
    assert joined.run.run_id == (lived / "wandb" / "run_id").read_text().strip()
    runtimes = [numbers(row, "_runtime") for row in rows.values() if ("_runtime",) in row]
    assert runtimes == sorted(runtimes)


def test_what_w_and_b_has_lost_comes_from_metrics_jsonl(lived, tmp_path):
    """Its logs cut short, gone, and, as those of a first life that is not over, all empty."""
    folder = tmp_path / "tiny"
    shutil.copytree(lived, folder, symlinks=True)
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    (folder / "config.yaml").write_text("tracking: {project: tests, entity: null, wandb: offline}\n")
    for cut in (second.stat().st_size // 2, 0):
        second.write_bytes(second.read_bytes()[:cut])
        joined = join_lives(folder)
        assert {step: numbers(row, "loss") for step, row in joined.rows.items()} == losses(13, of={1: 1, 2: 7})
        assert joined.run.run_id == (lived / "wandb" / "run_id").read_text().strip() and joined.run.start_time.seconds
        shutil.rmtree(first.parent, ignore_errors=True)
    assert joined.run.project == "tests"


def test_what_is_uploaded_already_is_left_out(lived, tmp_path):
    folder = join_lives(lived).write(tmp_path, Uploaded(step=8, seconds=0.0))
    (log,) = folder.glob("*.wandb")
    records = [Record.FromString(content) for content in read_records(log)]
    assert [record.history.step.num for record in records if record.WhichOneof("record_type") == "history"] == [*range(9, 14)]
    assert [record.num for record in records] == list(range(1, len(records) + 1))
    samples = sorted(path.name.split("_")[1] for path in folder.glob("files/media/html/*"))
    assert samples == ["12"]  # and not those of steps 4 and 8
    summary = {item.nested_key[0]: json.loads(item.value_json) for record in records
               if record.WhichOneof("record_type") == "summary" for item in record.summary.update}
    assert (summary["loss"], summary["validation_loss"]) == (13.2, 6.0)


@pytest.mark.parametrize("size", [0, 1, 32768 - 7 - 7 - 7, 32768 - 7 - 7 - 6, 32768 - 7 - 7, 40_000, 100_000])
def test_a_log_is_read_as_it_was_written(size, tmp_path):
    draw = random.Random(size)
    records = [draw.randbytes(size), b"", draw.randbytes(10), draw.randbytes(size)]
    write_records(tmp_path / "log", records)
    assert list(read_records(tmp_path / "log")) == records
    torn = (tmp_path / "log").read_bytes()[:-1]
    (tmp_path / "log").write_bytes(torn)
    assert list(read_records(tmp_path / "log")) == records[:3]


def test_a_real_log_is_written_as_w_and_b_writes_it(lived, tmp_path):
    log = max(lived.glob("wandb/offline-run-*/*.wandb"))
    write_records(tmp_path / "log", read_records(log))
    assert (tmp_path / "log").read_bytes() == log.read_bytes() and log.stat().st_size > 1000


@pytest.mark.parametrize(("prepare", "words"), [
    (lambda folder: None, ["holds no W&B run", "tracking.wandb"]),
    (lambda folder: folder.rmdir(), ["is not a run folder"]),
    (lambda folder: (log := folder / "wandb" / "offline-run-1-x" / "run-x.wandb").parent.mkdir(parents=True)
     or log.write_bytes(b"another format"), ["does not begin as W&B's logs do", "wandb sync"]),
])  # fmt: skip
def test_nothing_to_upload_is_one_line(prepare, words, tmp_path, genscale):
    folder = tmp_path / "run"
    folder.mkdir()
    prepare(folder)
    message = genscale("sync", folder).message()
    assert all(word in message for word in words), message


def sync(folder: Path, server: Any, home: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "genscale", "sync", str(folder)], env=server.environment(home), text=True,
                          capture_output=True, timeout=200, check=False)


@pytest.mark.slow
def test_lives_that_are_uploaded_as_they_come_are_one_run_with_each_step_once(lived, wandb_server, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(lived, folder, symlinks=True)
    for life, (done, last) in {2: (0, 13), 3: (12, 17), 4: (17, 19)}.items():
        if life > 2:
            live(folder, life, done, last, "killed" if life == 3 else "well")
        uploaded = sync(folder, wandb_server, tmp_path)
        assert uploaded.returncode == 0, uploaded.stderr
        history = wandb_server.history()
        assert [row["_step"] for row in history] == list(range(1, last + 1)), uploaded.stdout
    # Step 13 was uploaded before the third life, which went on from 12, made it again.
    assert {row["_step"]: row["loss"] for row in history} == losses(19, of={1: 1, 2: 7, 3: 14, 4: 18})
    assert {row["_step"]: row["validation_loss"] for row in history if "validation_loss" in row} == {4: 2, 8: 4, 12: 6, 16: 8}
    assert [*wandb_server.runs] == [(folder / "wandb" / "run_id").read_text().strip()]
    samples = sorted(int(name.split("_")[1]) for name in wandb_server.files if name.startswith("media/html/"))
    assert samples == [4, 8, 12, 16]
    again = sync(folder, wandb_server, tmp_path)
    assert again.returncode == 0 and "nothing new" in again.stdout
    assert wandb_server.history() == history
    assert not list(folder.glob(".sync-*"))
    assert {record["step"] for record in read_metrics(folder / "metrics.jsonl")} == set(range(1, 20))


@pytest.mark.slow
def test_a_server_that_refuses_or_is_out_of_reach_is_one_line(lived, wandb_server, tmp_path):
    wandb_server.mode = "403"
    rejected = sync(lived, wandb_server, tmp_path)
    assert (rejected.returncode, rejected.stderr) == (2, "error: W&B did not take the run: permission denied\n")
    wandb_server.mode = "500"
    refused = sync(lived, wandb_server, tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: W&B at ") and refused.stderr.count("\n") == 1
    wandb_server.close()
    wandb_server.address = "http://127.0.0.1:9"
    gone = sync(lived, wandb_server, tmp_path)
    assert gone.returncode == 2 and "cannot be reached" in gone.stderr and "internet" in gone.stderr
