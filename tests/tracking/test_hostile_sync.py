"""`genscale sync` of a folder that a stranger has made: nothing of this machine is uploaded that is not the run's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from genscale.errors import UserError
from genscale.tracking.wandb_lives import EVERY, Uploaded, join_lives
from genscale.tracking.wandb_log import read_records, write_records
from genscale.tracking.wandb_tracker import _run_id
from genscale.verbs.sync import sync


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one life of one row, and with a folder of samples."""
    record = Record()
    record.run.run_id, record.run.project = "abc12345", "p"
    row = Record()
    row.history.step.num = 4
    row.history.item.add(key="loss", value_json="1.0")
    keep(tmp_path / "run", record, row)
    return tmp_path / "run"


def keep(folder: Path, *records: Record) -> Path:
    log = folder / "wandb" / "offline-run-1-abc12345" / "run-abc12345.wandb"
    (log.parent / "files" / "media" / "images").mkdir(parents=True, exist_ok=True)
    write_records(log, [record.SerializeToString() for record in records])
    return log


def records_of(run: Path) -> list[Record]:
    return [Record.FromString(content) for content in read_records(next(run.glob("wandb/*/*.wandb")))]


def test_links_and_pipes_are_not_uploaded(run, tmp_path) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text("a key of the user's own")
    files = next(run.glob("wandb/*/files"))
    for name in ("notes.txt", f"media/images/sample_4_{0:020}.png", f"media/images/sample_4_{1:020}.html"):
        (files / name).symlink_to(secret)
    (files / "own").symlink_to(tmp_path)
    os.mkfifo(files / "media" / "images" / "sample_4_22222222222222222222.html")
    (files / "media" / "images" / "sample_4_33333333333333333333.png").write_text("%!PS no picture")
    (files / "output.log").write_text("the run's own")
    joined = join_lives(run)
    assert set(joined.rows[4]) == {("_step",), ("loss",)}
    folder = joined.write(tmp_path / "out", Uploaded())
    assert [path.name for path in (folder / "files").rglob("*") if not path.is_dir()] == ["output.log"]


def test_the_id_of_a_run_is_one_and_its_own(run, tmp_path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef0123456789abcdef01234567")
    file = run / "wandb" / "run_id"
    file.symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match="is a link"):
        _run_id(run / "wandb")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="named pipe"):
        _run_id(run / "wandb")
    file.unlink()
    for content, words in ((b"\x1b[31m", "no id"), (b"a b", "no id"), (b"\xff\xfa", "no text|UTF"), (b"x" * 2000, "1,024")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=words):
            _run_id(run / "wandb")
    file.write_text("")  # of a full disk
    assert _run_id(run / "wandb") == _run_id(run / "wandb") == file.read_text().strip()


def test_records_that_ask_for_more_are_left_out(run, tmp_path) -> None:
    """An artifact names files anywhere on this machine, TensorBoard's a folder to watch, an alert goes to people."""
    artifact, board, alert = Record(), Record(), Record()
    artifact.artifact.manifest.contents.add(path="x", local_path="/etc/passwd")
    board.tbrecord.log_dir = "/"
    alert.alert.title = "click here"
    keep(run, *records_of(run), artifact, board, alert)
    folder = join_lives(run).write(tmp_path / "out", Uploaded())
    kinds = {Record.FromString(content).WhichOneof("record_type") for content in read_records(next(folder.glob("*.wandb")))}
    assert kinds <= {None, *EVERY, "header", "run", "exit", "history", "summary", "files"} and "history" in kinds


def test_names_that_lead_elsewhere_are_one_line(run) -> None:
    records = records_of(run)
    records[0].run.run_id = "../../../escaped"
    keep(run, *records)
    with pytest.raises(UserError, match=r"its W&B records are not as W&B writes them .*a run called '../../../escaped'"):
        join_lives(run)


def hostile_row(key: str, value: str) -> Record:
    row = Record()
    row.history.item.add(key=key, value_json=value)
    return row


@pytest.mark.parametrize("row", [hostile_row("_step", "[]"), hostile_row("_step", "x"), hostile_row("_runtime", '"\\u001b"'),
                                 hostile_row("_step", "1e999"), hostile_row("_step", "[" * 100_000)])
def test_rows_that_are_none_are_one_line(run, row) -> None:
    keep(run, *records_of(run), row)
    with pytest.raises(UserError, match="its W&B records are not as W&B writes them"):
        join_lives(run)


def test_the_folder_says_not_to_whom_the_key_is_sent(run, monkeypatch) -> None:
    (run / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match="wandb/settings would say which server this machine's W&B key is sent to"):
        sync(Path("."))


def test_logs_that_are_none(run) -> None:
    log = next(run.glob("wandb/*/*.wandb"))
    write_records(log, [b"\xff\xff\xff\xff no record"])
    with pytest.raises(UserError, match="DecodeError"):
        join_lives(run)
    with log.open("r+b") as file:  # 1 TiB of nothing, which is read as far as it is something
        file.truncate(2**40)
    with pytest.raises(UserError, match="DecodeError"):
        join_lives(run)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(UserError, match="holds no W&B run to upload"):
        join_lives(run)
