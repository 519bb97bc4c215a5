"""The type checker, as pyproject.toml configures it: no complaint in what users import, elsewhere never more than before."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import genscale

ROOT = Path(__file__).resolve().parents[1]
MOST = 12
"""Complaints in all of genscale. May only fall: whoever mends some lowers it."""


@pytest.mark.slow
def test_the_number_of_complaints_only_falls(tmp_path):
    pytest.importorskip("mypy", reason="mypy comes with genscale[test]")
    done = subprocess.run([sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--no-error-summary"], cwd=ROOT,
                          capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    complaints = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(complaints) <= MOST, "\n".join([f"{len(complaints)} complaints, more than {MOST}:", *complaints])
    front = [getattr(genscale, name) for name in getattr(genscale, "__all__", ())]
    files = {inspect.getsourcefile(each) for each in front if inspect.isclass(each) or inspect.isfunction(each)}
    users = {Path(file).resolve().relative_to(ROOT).as_posix() for file in files} | {"genscale/__init__.py"}
    assert not [line for line in complaints if line.partition(":")[0] in users]
