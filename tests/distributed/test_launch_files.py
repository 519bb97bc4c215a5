"""Every file in launch/ trains, through the README's command; so do two processes started by hand with torchrun."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from genscale.testing.processes import torchrun
from genscale.testing.runs import Run

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
STRATEGY_OF = {"cpu": "ddp", "ddp": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero3-offload": "zero3",
               "fsdp2": "fsdp2"}
IN_CI = ("zero3-offload", "fsdp2")


def test_every_launch_file_is_tried() -> None:
    assert {path.stem for path in (ROOT / "launch").glob("*.yaml")} - {"site"} == set(STRATEGY_OF)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(each, marks=() if each in IN_CI else pytest.mark.matrix) for each in STRATEGY_OF])
def test_accelerate_launch(name: str, tiny_config: Path, tiny_run: Path, trained: Path, genscale_process: Any) -> None:
    done = genscale_process("--config_file", f"launch/{name}.yaml", "train.py", "--config", tiny_config, command=ACCELERATE)
    assert done.code == 0, done.err
    assert f"{STRATEGY_OF[name]}, 2 processes" in done.err
    assert Run(tiny_run).losses() == pytest.approx(Run(trained).losses(), rel=1e-5)


@pytest.mark.slow
def test_torchrun(tiny_config: Path, tiny_run: Path, trained: Path, genscale_process: Any) -> None:
    done = genscale_process("train.py", "--config", tiny_config, "--parallel.strategy", "fsdp2", command=torchrun(2))
    assert done.code == 0, done.err
    assert Run(tiny_run).losses() == pytest.approx(Run(trained).losses(), rel=1e-5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", pytest.param("zero2", marks=pytest.mark.matrix)])
def test_two_accelerate_launches_by_hand(name: str, tiny_config: Path, tiny_run: Path, trained: Path, genscale_start: Any,
                                         genscale_finish: Any) -> None:
    """As on two machines: the README's command on each, with its rank and the first one's address and port."""
    port, started = free_port(), []
    for machine in range(2):
        options = ("--config_file", f"launch/{name}.yaml", "--num_machines", "2", "--num_processes", "2", "--machine_rank",
                   str(machine), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
        started.append(genscale_start(*options, "train.py", "--config", tiny_config, command=ACCELERATE,
                                      GLOO_SOCKET_IFNAME="lo"))
    ends = [genscale_finish(process) for process in started]
    assert [done.code for done in ends] == [0, 0], ends[0].err + ends[1].err
    assert f"{STRATEGY_OF[name]}, 2 processes" in ends[0].err
    assert Run(tiny_run).losses() == pytest.approx(Run(trained).losses(), rel=1e-5)


@pytest.mark.slow
def test_local_script(tiny_config: Path, tiny_run: Path, trained: Path, genscale_process: Any) -> None:
    script = ("bash", "launch/local.sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = genscale_process("--config", tiny_config, command=script, STRATEGY="zero1", PROCESSES="2", PATH=path,
                            GENSCALE_VENV="/nonexistent")
    assert done.code == 0, done.err
    assert "2 processes on the CPU, zero1" in done.out and "zero1, 2 processes" in done.err
    assert Run(tiny_run).losses() == pytest.approx(Run(trained).losses(), rel=1e-5)


def test_local_script_names_the_strategies(genscale_process: Any) -> None:
    done = genscale_process(command=("bash", "launch/local.sh"), STRATEGY="zero4")
    assert done.code == 1 and "STRATEGY: zero4 is not one of cpu ddp fsdp2 zero1" in done.err, done.err


@pytest.mark.slow
def test_two_torchruns_by_hand(tiny_config: Path, tiny_run: Path, trained: Path, genscale_start: Any,
                               genscale_finish: Any) -> None:
    """As on two machines: one command a node, the first node's address and port given to both."""
    port, started = free_port(), []
    for node in range(2):
        command = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
                   "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        started.append(genscale_start("train.py", "--config", tiny_config, command=command, GLOO_SOCKET_IFNAME="lo"))
    for process in started:
        done = genscale_finish(process)
        assert done.code == 0, done.err
    assert Run(tiny_run).losses() == pytest.approx(Run(trained).losses(), rel=1e-5)
