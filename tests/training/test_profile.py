"""train.profile: a trace of the steps asked for, and a run that is none the different."""

from __future__ import annotations

import gzip
import json

import pytest


@pytest.mark.parametrize("steps, profiled", [(14, 3), (4, 2), (2, 5)])
def test_the_steps_asked_for_are_traced(steps: int, profiled: int, genscale, tiny_config, tiny_run) -> None:
    settings = ("train", "--config", tiny_config, "--train.steps", steps, "--train.checkpoint_every", 0)
    assert genscale(*settings, "--train.profile", profiled).code == 0
    digest = genscale("checkpoint", "digest", tiny_run).out
    trace = json.loads(gzip.decompress((tiny_run / "profile" / "trace.json.gz").read_bytes()))
    updates = [event for event in trace["traceEvents"] if event.get("name") == "aten::_fused_adamw_"]
    groups = 2  # of parameters: decayed ones and others
    assert len(updates) == groups * min(steps - 1, profiled)
    assert "aten::_fused_adamw_" in (tiny_run / "profile" / "table.txt").read_text()

    assert genscale(*settings, "--run.resume", "never").code == 0
    assert not (tiny_run / "profile").exists()
    assert genscale("checkpoint", "digest", tiny_run).out == digest
