"""The launcher's wishes as real launchers leave them, and processes that are really started, stopped and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genscale.errors import UserError
from genscale.parallel.launch_request import (
    LaunchRequest,
    clear_launch_environment,
    read_launch_request,
    resolve_offload,
    resolve_precision,
    resolve_strategy,
)
from genscale.parallel.launcher import launch_processes

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = {
    "cpu": (None, None),
    "ddp": (None, None),
    "zero1": ("zero1", None),
    "zero2": ("zero2", None),
    "zero3": ("zero3", None),
    "zero3-offload": ("zero3", "cpu"),
    "fsdp2": ("fsdp2", None),
}
ACCELERATE_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]

REPORT = """
import os
from genscale.parallel.launch_request import read_launch_request
r = read_launch_request()
with open(os.path.join({folder!r}, str(r.rank)), "w") as file:
    file.write(repr((r.strategy, r.offload, r.precision, r.world_size, r.local_rank, os.environ.get("CUDA_VISIBLE_DEVICES"))))
"""

# A worker that takes what is asked for as its life: ends well, fails, is killed, or waits for a signal and saves for a second.
WORKER = """
import os, signal, sys, time
from genscale.parallel.launcher import follow_launcher
life, folder, rank = sys.argv[1], sys.argv[2], os.environ["RANK"]
def say(word):
    with open(os.path.join(folder, rank), "a") as file:
        file.write(word + " ")
def save(number, frame):
    say(signal.Signals(number).name)
    time.sleep(1)
    say("saved")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
follow_launcher()
say(f"pid={os.getpid()} threads={os.environ['OMP_NUM_THREADS']} ready")
if life == "mistake":
    print(f"error: rank {rank} says why", file=sys.stderr) if rank == "0" else time.sleep(20)
    sys.exit(2)
if life == "bug" and rank == "1":
    raise RuntimeError("a bug of ours")
if life == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if life != "well":
    time.sleep(60)
"""

# What a shell starts in the background ignores Ctrl-C, a CI job perhaps among it; the starter under test must not inherit that.
STARTER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from genscale.parallel.launcher import run_workers
sys.exit(run_workers(2, sys.argv[1:]))
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that no launcher started."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    return monkeypatch


def shell_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def request(strategy: str | None = None, world_size: int = 2, offload: str | None = None, precision: str | None = None):
    return LaunchRequest(strategy, offload, precision, world_size, 0, 0)


def test_without_a_launcher_a_run_is_one_process(environment):
    assert read_launch_request() == LaunchRequest(None, None, None, 1, 0, 0)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("cpu", "zero1", "zero2") else [])
                                  for name in sorted({p.stem for p in (ROOT / "launch").glob("*.yaml")} - {"site"})])
def test_launch_file_starts_two_processes_that_know_its_strategy(name, tmp_path):
    (tmp_path / "report.py").write_text(REPORT.format(folder=str(tmp_path)))
    command = [*ACCELERATE_LAUNCH, f"launch/{name}.yaml", tmp_path / "report.py"]
    subprocess.run(command, cwd=ROOT, env=shell_environment(), check=True, timeout=100)
    reports = [eval((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    strategy, offload = LAUNCH_FILES[name]
    assert [r[:5] for r in reports] == [(strategy, offload, None, 2, rank) for rank in (0, 1)]
    if name == "cpu":
        assert reports[0][5] == "-1,-1"  # CUDA ends its list at the first number that is no device


def test_asking_accelerate_for_two_processes_and_getting_one_is_an_error(tmp_path):
    (tmp_path / "report.py").write_text(REPORT.format(folder=str(tmp_path)))
    command = [*ACCELERATE_LAUNCH, "launch/zero2.yaml", "--cpu", tmp_path / "report.py"]
    done = subprocess.run(command, cwd=ROOT, env=shell_environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "num_processes of the launcher: more than 1 was asked for" in done.stderr


def test_torchrun_variables_are_read(environment):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        environment.setenv(name, value)
    assert read_launch_request() == LaunchRequest(None, None, None, 4, 3, 1)


@pytest.mark.parametrize(("variables", "words"), [
    ({"WORLD_SIZE": "2"}, ["RANK", "not set", "WORLD_SIZE is 2", "torchrun"]),
    ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, ["WORLD_SIZE=two", "whole numbers"]),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["mixed_precision", "fp8", "train.precision"]),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["megatron_lm", "launch/zero3.yaml"]),
    ({"ACCELERATE_USE_FSDP": "true"}, ["fsdp_version", "1", "2"]),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, ["fsdp_offload_params", "false"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ["zero_stage", "0", "1"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "5"}, ["zero_stage", "nearest allowed: 3"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "a.json"}, ["a.json", "zero_stage"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, ["nvme", "cpu"]),
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ["offload_param", "none"]),
])  # fmt: skip
def test_what_the_launcher_cannot_have_is_one_line(environment, variables, words):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError) as error:
        read_launch_request()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("asked", "launcher", "world_size", "strategy"), [
    ("auto", None, 1, "single"), ("auto", None, 2, "ddp"), ("auto", "zero3", 2, "zero3"), ("auto", "fsdp2", 1, "fsdp2"),
    ("zero2", "zero2", 2, "zero2"), ("zero2", None, 2, "zero2"), ("ddp", None, 1, "ddp"), ("single", None, 1, "single"),
])  # fmt: skip
def test_strategy(asked, launcher, world_size, strategy):
    assert resolve_strategy(asked, request(launcher, world_size)) == strategy


@pytest.mark.parametrize(("asked", "launcher", "world_size", "words"), [
    ("zero3", "zero2", 2, ["parallel.strategy: zero3", "configured for zero2", "auto"]),
    ("single", "fsdp2", 1, ["parallel.strategy: single", "configured for fsdp2"]),
    ("ddp", "zero1", 2, ["parallel.strategy: ddp", "configured for zero1"]),
    ("single", None, 2, ["parallel.strategy: single", "started 2", "ddp"]),
])  # fmt: skip
def test_contradicting_strategies_are_an_error(asked, launcher, world_size, words):
    with pytest.raises(UserError) as error:
        resolve_strategy(asked, request(launcher, world_size))
    assert all(word in str(error.value) for word in words), error.value


def test_offload():
    assert resolve_offload("none", "zero3", request("zero3", offload="cpu")) == "cpu"
    assert resolve_offload("cpu", "zero1", request("zero1")) == "cpu"
    assert resolve_offload("none", "ddp", request()) == "none"
    with pytest.raises(UserError, match=r"parallel\.offload: cpu needs ZeRO, but the strategy is fsdp2; nearest allowed: none"):
        resolve_offload("cpu", "fsdp2", request("fsdp2"))


def test_precision():
    assert resolve_precision("bf16", request()) == "bf16"
    assert resolve_precision("bf16", request(precision="bf16")) == "bf16"
    assert resolve_precision("auto", request(precision="fp16")) == "fp16"
    flags = Path("/proc/cpuinfo").read_text().split()
    native = "bf16" if "avx512_bf16" in flags or "amx_tile" in flags else "fp32"
    assert torch.cuda.is_available() or resolve_precision("auto", request()) == native
    with pytest.raises(UserError, match=r"train\.precision: fp32 contradicts the launcher.*mixed_precision bf16"):
        resolve_precision("fp32", request(precision="bf16"))


def test_accelerate_decides_nothing_once_the_environment_is_cleared(environment):
    """Before: Accelerator() takes DeepSpeed, bf16 and 4 accumulation steps from the launcher. After: none of them."""
    code = (
        "import sys, os; from genscale.parallel.launch_request import clear_launch_environment\n"
        "clear_launch_environment()\n"
        "from accelerate import Accelerator; a = Accelerator(cpu=True)\n"
        "print(a.state.deepspeed_plugin, a.mixed_precision, a.gradient_accumulation_steps, a.state.dynamo_plugin.backend.value)"
    )
    asked = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }  # fmt: skip
    environment_then = {**shell_environment(), **asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment_then, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["None", "no", "1", "NO"], done.stderr


def test_clearing_keeps_ranks_threads_and_the_device(environment):
    kept = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, value in kept.items():
        environment.setenv(name, value)
    environment.setenv("FSDP_VERSION", "2")
    clear_launch_environment()
    assert kept.items() <= os.environ.items()
    assert "FSDP_VERSION" not in os.environ


def test_no_processes_are_not_launched():
    with pytest.raises(UserError, match="--processes: 0 is not possible"):
        launch_processes(0, [])


def start(life: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", STARTER, str(folder / "worker.py"), life, str(folder)]
    environment = {**shell_environment(), **variables}
    if "OMP_NUM_THREADS" not in variables:
        environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_ready(folder: Path) -> list[int]:
    """The process ids of both workers once they wait for signals."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        words = [(folder / rank).read_text() for rank in "01" if (folder / rank).exists()]
        if len(words) == 2 and all("ready" in w for w in words):
            return [int(w.split("pid=")[1].split()[0]) for w in words]
        time.sleep(0.05)
    raise TimeoutError("the workers did not start")


def test_threads_share_the_cores_unless_set(tmp_path):
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    for folder, variables, threads in [("shared", {}, share), ("set", {"OMP_NUM_THREADS": "3"}, 3)]:
        (tmp_path / folder).mkdir()
        assert start("well", tmp_path / folder, **variables).wait(60) == 0
        assert all(f"threads={threads} ready" in (tmp_path / folder / rank).read_text() for rank in "01")


def test_a_mistake_is_told_once_and_nothing_else(tmp_path):
    process = start("mistake", tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (2, "", "error: rank 0 says why\n")


def test_a_bug_keeps_its_traceback_and_the_launcher_adds_none(tmp_path):
    process = start("bug", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("Traceback") == 1
    assert errors.endswith("RuntimeError: a bug of ours\n")


def test_a_killed_process_is_named_and_the_other_one_saves(tmp_path):
    process = start("killed", tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors == "genscale: process 1 of 2 was ended by SIGKILL (out of memory?); the others were stopped\n"
    assert (tmp_path / "0").read_text().endswith("SIGTERM saved ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once_and_is_waited_for(tmp_path, number):
    process = start("waits", tmp_path)
    workers = wait_until_ready(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    for rank, pid in zip("01", workers, strict=True):
        assert (tmp_path / rank).read_text().split("ready ")[1].startswith(f"{number.name} ")
        assert (tmp_path / rank).read_text().endswith("saved ")
        assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent was killed")
def test_workers_of_a_killed_launcher_save_and_end(tmp_path):
    process = start("waits", tmp_path)
    workers = wait_until_ready(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)
    assert all((tmp_path / rank).read_text().endswith("SIGTERM saved ") for rank in "01")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
