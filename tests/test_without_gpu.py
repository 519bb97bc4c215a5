"""What a GPU would be asked for, by a CUDA build of torch on a stand-in for one: see benchmarks/fake_gpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genscale.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from fake_gpu import missing
    finally:
        sys.path.remove(str(BENCHMARKS))
    lacking = missing()
    if lacking is not None:
        pytest.skip(f"no stand-in for a GPU can be made: {lacking}")
    out = tmp_path_factory.mktemp("gpu") / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, BENCHMARKS / "without_gpu.py", "--out", out], capture_output=True, text=True,
                          env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_no_step_makes_the_host_wait(found):
    assert len(found["networks"]) == 9
    assert not {row["network"]: row["waits"] for row in found["networks"] if row["waits"]}


@pytest.mark.slow
def test_attention_is_one_kernel(found):
    for row in found["networks"]:
        assert bool(row["attention"]) == ("gpt" in row["network"] or "qwen" in row["network"] or "llama" in row["network"])


@pytest.mark.slow
def test_every_family_trains_evaluates_samples_and_saves(found):
    assert {row["family"] for row in found["runs"]} == set(FAMILIES)


@pytest.mark.slow
def test_a_plan_holds_what_cuda_would(found):
    """Grouped queries in fp32 are planned a little too high."""
    for row in found["plans"]:
        assert row["ratio"] == pytest.approx(1, abs=0.03 if "llama" in row["case"] else 0.01), row
