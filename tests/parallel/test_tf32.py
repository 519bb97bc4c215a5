"""train.tf32: products in fp32 may be rounded, where that was asked for and as long as the run lasts."""

from __future__ import annotations

import pytest
import torch

import genscale
from genscale.errors import UserError
from genscale.parallel.precision import allow_tf32
from genscale.training.process_state import process_left_as_found


def test_it_ends_with_the_run():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with process_left_as_found():
        allow_tf32()
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


def test_a_cpu_has_no_such_thing(tmp_path):
    config = genscale.config("points", {"train.tf32": True, "train.steps": 1, "run.dir": tmp_path})
    with pytest.raises(UserError, match="train.tf32: true has no effect on the CPU"):
        genscale.train(config)
    assert not list(tmp_path.iterdir())
