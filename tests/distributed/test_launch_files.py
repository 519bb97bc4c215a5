"""Every file in launch/ trains, through the README's command; so do two processes started by hand with torchrun."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
STRATEGY_OF = {"cpu": "ddp", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero3-offload": "zero3",
               "fsdp2": "fsdp2"}
IN_CI = ("ddp", "zero3-offload", "fsdp2")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_every_launch_file_is_tried() -> None:
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} == set(STRATEGY_OF)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(each, marks=() if each in IN_CI else pytest.mark.matrix) for each in STRATEGY_OF])
def test_accelerate_launch(name: str, tiny_config: Path, tiny_run: Path, trained: Path, genscale_process: Any) -> None:
    done = genscale_process("--config_file", f"launch/{name}.yaml", "train.py", "--config", tiny_config, command=ACCELERATE)
    assert done.code == 0, done.err
    assert f"{STRATEGY_OF[name]}, 2 processes" in done.err
    assert losses(tiny_run) == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.slow
def test_torchrun(tiny_config: Path, tiny_run: Path, trained: Path, genscale_process: Any) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = genscale_process("train.py", "--config", tiny_config, "--parallel.strategy", "fsdp2", command=torchrun)
    assert done.code == 0, done.err
    assert losses(tiny_run) == pytest.approx(losses(trained), rel=1e-5)


@pytest.mark.slow
def test_two_torchruns_by_hand(tiny_config: Path, tiny_run: Path, trained: Path, genscale_start: Any,
                               genscale_finish: Any) -> None:
    """As on two machines: one command a node, the first node's address and port given to both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for node in range(2):
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
                    "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        started.append(genscale_start("train.py", "--config", tiny_config, command=torchrun, GLOO_SOCKET_IFNAME="lo"))
    for process in started:
        done = genscale_finish(process)
        assert done.code == 0, done.err
    assert losses(tiny_run) == pytest.approx(losses(trained), rel=1e-5)
