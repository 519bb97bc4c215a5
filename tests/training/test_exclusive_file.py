"""A file that the first of several makes, also where the file system has no hard links."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from genscale.supervise.ending import Ending
from genscale.supervise.exclusive_file import give_name


@pytest.fixture(params=["links", "no links"], autouse=True)
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


def test_the_first_one_stays(tmp_path: Path) -> None:
    for text in ("first", "second"):
        draft = tmp_path / f"{text}-draft"
        draft.write_text(text)
        if text == "first":
            give_name(draft, tmp_path / "file")
        else:
            with pytest.raises(FileExistsError):
                give_name(draft, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "first"


def test_one_process_speaks_of_the_end(tmp_path: Path) -> None:
    one, other = Ending(tmp_path, 0), Ending(tmp_path, 1)
    assert one.claim("failed", 2, reason="first") and not other.claim("failed", 1, reason="second")
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]
    assert json.loads((tmp_path / "ended.json").read_text())["reason"] == other.said()["reason"] == "first"
