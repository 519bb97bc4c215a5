"""The W&B server on loopback, as a fixture. It is a plain module, for the fault harness runs it too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from loopback_wandb import Server

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def wandb_server() -> Iterator[Server]:
    from loopback_wandb import Server

    server = Server()
    yield server
    server.close()
