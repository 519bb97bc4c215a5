"""Weights that are no numbers are found, and what pads DeepSpeed's partitions out is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_padding_is_no_weight(answers):
    found = answers(Path(__file__).with_name("padding_worker.py"), {name: {"strategy": name} for name in ("zero2", "zero3")}, 3)
    assert found == {name: {"padding": True, "weight": False} for name in ("zero2", "zero3")}
