"""Updates with a loss that is no number, seen by one of two processes: leaving one out is as if its phase had not been run,
going back is as if the data had never had the batch, and a dry batch is as if there had been none. Bit for bit, whole runs of
a GAN with batch normalisation, singular vectors, an average and a lazy gradient penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("guards_worker.py")
NETWORKS = {"model.generator_norm": "batch", "model.spectral_norm": True, "train.micro_batch_size": 2}
COPIES = {"parallel.shard_size": 1, "model.width": 128}
PENALTY = {"objective.r1": 1.0, "objective.regularise_every": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "settings"), [
    ("zero2", PENALTY), *(pytest.param(*cell, marks=pytest.mark.matrix) for cell in (
        ("ddp", PENALTY), ("fsdp2", PENALTY), ("zero1", PENALTY), ("zero3", {}), ("zero3", COPIES),
        *((each, {"train.precision": "bf16"}) for each in ("zero1", "zero2", "zero3", "fsdp2"))))])  # fmt: skip
def test_no_trace_of_what_was_left_out(strategy: str, settings: dict[str, Any], answers: Any) -> None:
    settings = {"parallel.strategy": strategy, **NETWORKS, **settings}
    none = {**settings, "guards.dry_batch": False}
    once = {**settings, "guards.skips": 1}
    runs = answers(WORKER, {
        "plain": {"settings": none}, "dry": {"settings": settings}, "left-out": {"bad": [5], "settings": settings},
        "not-run": {"without": [["discriminator", 6]], "settings": none},
        "back": {"bad": [5, 6], "settings": once}, "never-had": {"absent": [5, 6], "settings": none},
        "again": {"again_from": ["back", 8], "bad": [5, 6], "settings": once},
    })
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
def test_a_run_that_goes_wrong_again_and_again_stops(answers: Any) -> None:
    settings = {"parallel.strategy": "ddp", "guards.non_finite": "rollback", "guards.dry_batch": False}
    runs = answers(WORKER, {"lost": {"bad": [5, 6, 7], "settings": settings}, "early": {"bad": [2], "settings": settings}})
    for name, words in (("lost", "NonFiniteLoss: discriminator/adversarial became nan at step 6 on rank 1, after going back to "
                                 "a checkpoint 2 times (guards.rollbacks); last good checkpoint: "),
                        ("early", "at step 3 on rank 1; no checkpoint to go back to yet (train.checkpoint_every is 4)")):
        said = [error for error in runs[name]["errors"] if error != "exit code 2"]  # one process speaks for both
        assert len(said) == 1 and words in said[0]
    assert "step-00000004" in str(runs["lost"]["errors"])
    assert [line["step"] for line in runs["lost"]["lines"]] == [1, 2, 3, 4, 5]
