"""The benchmarks measure what the product runs: the environment that genscale sets, real commands, and honest statistics."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Runs each file up to where it would load torch, and prints those that had not loaded genscale by then.
FIRST_IMPORTS = """
import importlib.abc, os, runpy, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os._exit(0 if "genscale" in sys.modules else 1)

sys.meta_path.insert(0, Finder())
for file in sys.argv[1:]:
    if child := os.fork():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            print(file)
    else:
        sys.path[0] = os.path.dirname(file)
        runpy.run_path(file)
        os._exit(0)
"""


def test_genscale_is_loaded_before_torch():
    """What it sets is heeded only while torch is loaded: OMP_WAIT_POLICY came too late once, in the benchmarks alone."""
    files = sorted(BENCHMARKS.glob("*.py"))
    done = subprocess.run([sys.executable, "-c", FIRST_IMPORTS, *map(str, files)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len(files) > 10 and (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_peers_know_nothing_of_genscale():
    """Nor does what lets them take turns: their environment is that of their users."""
    files = [*(BENCHMARKS / "peers").glob("*.py"), *(BENCHMARKS / "gate").glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == "genscale" for name in names), f"{path.name}:{node.lineno}"
    assert len(files) > 5


def test_statistics(monkeypatch):
    """Of numbers whose medians, ratios and quartiles are known."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from turns import Turn, compared

    ours = [Turn(seconds, 3.0) for seconds in (2.0, 4.0, 6.0, 8.0, 100.0)]
    theirs = [Turn(seconds, 2.0) for seconds in (2.0, 2.0, 4.0, 4.0, 400.0)]
    control = [Turn(seconds, 1.0) for seconds in (2.0, 2.0, 5.0, 5.0, 400.0)]
    found = compared({"genscale": ours, "peer": theirs, "control": control})
    assert found["rounds"] == 5
    assert found["median_step_seconds"] == {"genscale": 6.0, "peer": 4.0, "control": 5.0}
    assert found["median_step_cpu_seconds"] == {"genscale": 3.0, "peer": 2.0, "control": 1.0}
    assert (found["ratio_of_medians"], found["ratio_of_cpu_medians"]) == (1.5, 1.5)
    assert found["quartiles_of_ratios"] == [1.0, 1.5, 2.0]  # of 1/4, 1, 1.5, 2, 2
    assert found["control"] == {"ratio_of_medians": 1.25, "quartiles_of_ratios": [1.0, 1.0, 1.25], "ratio_of_cpu_medians": 0.5}


PROGRAM = """
import os, torch
layer = torch.nn.Linear(2, 1)
first, second = (torch.optim.SGD([parameter], lr=0.1) for parameter in (layer.weight, layer.bias))
print({name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}, flush=True)
while True:
    first.step()
    second.step()
    print("step", flush=True)
"""


def test_a_program_takes_the_steps_it_is_told_to(monkeypatch, tmp_path):
    """As it is, with two optimizers, in an environment without what this shell says of threads."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    from contestants import Contestant, Failed, Program

    contestant = Contestant(Program([sys.executable, "-c", PROGRAM], tmp_path, threads=1), tmp_path / "scratch")
    try:
        contestant.wait_until_ready()
        assert contestant.first_step.seconds > contestant.first_step.cpu_seconds / 4 > 0
        contestant.turn(1)  # from the first optimizer's update, after which it waited, to the second's
        for steps in (1, 3, 2):
            before = contestant.output().count("step")
            turn = contestant.turn(steps)
            assert contestant.output().count("step") == before + steps and turn.seconds > 0
        assert contestant.parameters == 3
        assert contestant.output().splitlines()[0] == "{'OMP_WAIT_POLICY': None, 'OMP_NUM_THREADS': '1'}"
    finally:
        contestant.close()
    failing = Contestant(Program([sys.executable, "-c", "print('no such option'); exit(2)"], tmp_path), tmp_path / "failing")
    with pytest.raises(Failed, match="no such option"):
        failing.wait_until_ready()
    failing.close()


@pytest.mark.slow
def test_the_acceptance_on_a_gpu_finds_no_fault_of_its_own_without_one(tmp_path):
    def verdicts(sections: str) -> list[dict[str, Any]]:
        out = tmp_path / f"{sections}.json"
        command = [sys.executable, BENCHMARKS / "gpu_acceptance.py", "--device", "cpu", "--toy", "--budget", "60", "--out", out]
        done = subprocess.run([*map(str, command), "--only", sections], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())["verdicts"]

    found = verdicts("waits,resume")
    resumed = [each for each in found if each["what"].startswith("resume")]
    assert len(resumed) == 12 and all(each["resumed_equals_undisturbed"] and each["two_runs_equal_bits"] for each in resumed)
    assert sum(each["what"].startswith("waits") for each in found) == 10
    assert any("units_per_second" in each for each in verdicts("speed"))


@pytest.mark.slow
def test_counts_of_a_step(monkeypatch):
    """Images are laid out while they are cast."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from step_counts import counted

    gan = counted("dcgan", torch.device("cpu"), "bf16", sites=99)
    images = "(8, 3, 32, 32) float32 to (8, 3, 32, 32) float32"
    assert not any(images in site for phase in gan.values() for site in phase["largest"])
    assert gan["discriminator"]["copies into another layout"] == 3  # maps of 4 x 4 into rows and back
    assert 80 < gan["discriminator"]["operations"] <= 95 and 10 < gan["discriminator"]["casts"] <= 21  # 125 and 23 at first


@pytest.mark.slow
def test_counts_of_what_is_compiled(monkeypatch):
    """The loss walks twice through the logits; the blocks of a GAN have more graphs than torch's own limit, and all of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from compile_counts import bytes_a_logit, given_in_a_step, graphs

    assert bytes_a_logit() == {"in several passes": 40, "compiled": pytest.approx(12, abs=0.1)}
    assert given_in_a_step("dcgan-64", compiled=False)["in all"] <= 268  # 344 with copies of statistics, and buffers one by one
    found = graphs("dcgan, 64 pixels", None)
    assert found["graphs"] > 16 and found["left as they are"] == found["breaks"] == 0
