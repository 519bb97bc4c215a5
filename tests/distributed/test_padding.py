"""Weights that are no numbers are found, and what pads DeepSpeed's partitions out is none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_padding_is_no_weight(tmp_path):
    worker, out = Path(__file__).with_name("padding_worker.py"), tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone", str(worker), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text()) == {name: {"padding": True, "weight": False} for name in ("zero2", "zero3")}
