"""The tables of benchmarks/ that prove laws 1 and 2: every strategy resumed under every other, the sample order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("script", ["resume_table", "sample_order"])
def test_table(script, tmp_path):
    """It ends with an error where a cell is not as it must be."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
