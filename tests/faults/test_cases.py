"""Every fault of the table but kills, once, on one of the nine pairs of family and strategy. All of them on all pairs:
python benchmarks/fault_table.py --only cases."""

from __future__ import annotations

import random
from itertools import cycle

import pytest

IN_CI = (
    "5 disk full while logging", "5 disk full at the start", "5 read-only folder",
    "5 checkpoint files cut short, bit-flipped, missing", "5 checkpoint of an older version", "6 loss spike, skipped",
    "6 loss spike, rolled back", "7 out of memory on the host", "8 W&B fails in the middle", "10 two saves in a second",
)  # fmt: skip
BY_HAND = (
    "2 SIGINT, SIGTERM, SIGUSR1", "3 one rank hangs (SIGSTOP)", "4 one rank raises", "5 disk full while saving",
    "6 NaN on one rank, skipped", "6 NaN on one rank, rolled back", "8 W&B unreachable", "10 a second run in the folder",
    "10 resumed in another time zone",
)  # fmt: skip
"""Other tests of CI have them too, of single families."""
PAIRS = [(family, strategy) for strategy in ("zero2", "fsdp2", "ddp") for family in ("gpt", "dcgan", "vae")]
CELLS = [*(pytest.param(name, *pair) for name, pair in zip(IN_CI, cycle(PAIRS), strict=False)),
         *(pytest.param(name, *pair, marks=pytest.mark.matrix) for name, pair in zip(BY_HAND, cycle(PAIRS), strict=False))]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "family", "strategy"), CELLS)
def test_fault(name, family, strategy, tmp_path):
    """What the case's own text says."""
    from fault_bench import Bench, NoDisk
    from fault_cases import CASES

    try:
        CASES[name](Bench(family, strategy, tmp_path), random.Random(name))
    except NoDisk as error:
        pytest.skip(str(error))


def test_no_fault_is_left_out():
    from fault_cases import CASES

    assert sorted([*IN_CI, *BY_HAND]) == sorted(CASES)
    assert {cell.values[1:] for cell in CELLS if not cell.marks} == set(PAIRS)
