"""Updates with a loss that is no number, seen by one of two processes: leaving one out is as if its phase had not been run,
going back is as if the data had never had the batch, and a dry batch is as if there had been none. Bit for bit, whole runs of
a GAN with batch normalisation, singular vectors, an average and a lazy gradient penalty."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("guards_worker.py")
NETWORKS = {"model.generator_norm": "batch", "model.spectral_norm": True, "train.micro_batch_size": 2}
PENALTY = {"objective.r1": 1.0, "objective.regularise_every": 4}
Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], Outcomes]:
    """What guards_worker.py says of some variants, in one start of two processes."""

    def run(variants: list[dict[str, Any]]) -> Outcomes:
        folder = tmp_path_factory.mktemp("guarded")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(WORKER)]
        root = str(Path(__file__).resolve().parents[2])
        foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "ACCELERATE_", "TORCHELASTIC_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        done = subprocess.run([*command, json.dumps(variants), str(folder)], cwd=root, text=True, capture_output=True,
                              timeout=400, env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": root})
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "settings"), [
    ("zero2", PENALTY), *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in (
        ("ddp", PENALTY), ("fsdp2", PENALTY), ("zero1", PENALTY), ("zero3", {}),
        *((each, {"train.precision": "bf16"}) for each in ("zero1", "zero2", "zero3", "fsdp2"))))])  # fmt: skip
def test_no_trace_of_what_was_left_out(strategy: str, settings: dict[str, Any], guarded: Any) -> None:
    settings = {"parallel.strategy": strategy, **NETWORKS, **settings}
    none = {**settings, "guards.dry_batch": False}
    once = {**settings, "guards.skips": 1}
    runs = guarded([
        {"name": "plain", "settings": none}, {"name": "dry", "settings": settings},
        {"name": "left-out", "bad": [5], "settings": settings},
        {"name": "not-run", "without": [["discriminator", 6]], "settings": none},
        {"name": "back", "bad": [5, 6], "settings": once}, {"name": "never-had", "absent": [5, 6], "settings": none},
        {"name": "again", "again_from": ["back", 8], "bad": [5, 6], "settings": once},
    ])
    assert all(run["errors"] == [None, None] and run["steps"] == [4, 8, 12] for run in runs.values())
    tensors = {name: run["tensors"] for name, run in runs.items()}
    assert tensors["dry"] == tensors["plain"]
    assert tensors["left-out"] == tensors["not-run"] != tensors["plain"]
    assert tensors["back"] == tensors["never-had"] != tensors["plain"]
    assert runs["again"]["digest"] == runs["back"]["digest"]
    for name, counted in (("left-out", [None] * 5 + [1] * 7), ("back", [None] * 4 + [2] * 8)):
        assert [line["step"] for line in runs[name]["lines"]] == list(range(1, 13))
        assert [line.get("skipped_steps") for line in runs[name]["lines"]] == counted
    assert [line.get("rollbacks") for line in runs["back"]["lines"]] == [None] * 4 + [1] * 8
    assert runs["back"]["guards"]["batches"] == [5, 6]


@pytest.mark.slow
def test_a_run_that_goes_wrong_again_and_again_stops(guarded: Any) -> None:
    settings = {"parallel.strategy": "ddp", "guards.non_finite": "rollback", "guards.dry_batch": False}
    runs = guarded([{"name": "lost", "bad": [5, 6, 7], "settings": settings},
                    {"name": "early", "bad": [2], "settings": settings}])
    for name, words in (("lost", "NonFiniteLoss: discriminator/adversarial became nan at step 6 on rank 1, after going back to "
                                 "a checkpoint 2 times (guards.rollbacks); last good checkpoint: "),
                        ("early", "at step 3 on rank 1; no checkpoint to go back to yet (train.checkpoint_every is 4)")):
        said = [error for error in runs[name]["errors"] if error != "exit code 2"]  # one process speaks for both
        assert len(said) == 1 and words in said[0]
    assert "step-00000004" in str(runs["lost"]["errors"])
    assert [line["step"] for line in runs["lost"]["lines"]] == [1, 2, 3, 4, 5]
