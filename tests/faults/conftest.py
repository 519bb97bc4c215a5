"""The fault harness, as fixtures. It is plain modules, for benchmarks/fault_table.py runs it at full size."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """fault_runs.py: tiny real runs."""
    import fault_runs

    return fault_runs


@pytest.fixture(scope="session")
def campaign() -> ModuleType:
    """fault_campaign.py: runs that are killed again and again."""
    import fault_campaign

    return fault_campaign
