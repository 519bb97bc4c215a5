"""What the watchdog of a process leaves for those of the others: tests/test_hangs.py has what they make of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from genscale.parallel.processes import Processes
from genscale.supervise.ending import Ending
from genscale.supervise.watchdog import Watchdog


def test_a_process_can_be_found_as_soon_as_it_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the thread's first look, it could be neither named nor made to write its stacks."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "logs").mkdir()
    watchdog = Watchdog(tmp_path, Processes(), Ending(tmp_path, 0), 10.0, None)
    watchdog.start()
    try:
        assert [path.name for path in (tmp_path / "logs").glob("heartbeat-*")] == ["heartbeat-00000.json"]
        assert json.loads((tmp_path / "logs" / "heartbeat-00000.json").read_text())["pid"] == os.getpid()
    finally:
        watchdog.close()
    assert not list((tmp_path / "logs").iterdir())
