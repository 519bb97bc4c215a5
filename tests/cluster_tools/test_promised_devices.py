"""A job that was given GPUs never trains on the CPU in silence. Drivers are stood in for by a library that answers like one,
and builds of torch by their version.py; the training looks at this machine as it is."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from genscale.cluster import promised_devices
from genscale.cluster.lives import read_lives
from genscale.cluster.promised_devices import check_promised, promised_gpus

DRIVER = """
#include <unistd.h>
int cuInit(unsigned flags) { %s; return %d; }
int cuDeviceGetCount(int *count) { *count = %d; return 0; }
int cuGetErrorName(int code, const char **name) { *name = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"; return 0; }
"""


@pytest.fixture
def node(tmp_path, monkeypatch):
    """`node(build, driver)`: a node whose torch is of that build, and whose driver answers so; None: there is none."""

    def make(build: str, driver: tuple[str, int, int] | None) -> None:
        package, library = tmp_path / "site" / "torch", tmp_path / "lib" / "libcuda.so.1"
        for folder in (package, library.parent):
            folder.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('torch is not to be loaded')\n")
        (package / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = hip = xpu = None\n{build}\n")
        monkeypatch.syspath_prepend(str(package.parent))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))
        if driver is None:
            library.write_text("")  # before that of this machine
        elif shutil.which("cc") is None:
            pytest.skip("no C compiler here")
        else:
            subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=DRIVER % driver, text=True,
                           check=True, timeout=60)

    return make


@pytest.mark.parametrize(("build", "driver", "promised", "found", "of_node"), [
    ("cuda = '12.8'", None, "2", "Slurm gave 2 GPUs, and there is no NVIDIA driver here (", True),
    ("cuda = '12.8'", ("", 0, 2), "2", None, None),
    ("cuda = '12.8'", ("", 0, 1), "2", "Slurm gave 2 GPUs, and the NVIDIA driver shows 1", True),
    ("cuda = '12.8'", ("", 803, 0), "1", "the NVIDIA driver does not start (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)", True),
    ("cuda = '12.8'", ("sleep(60)", 0, 1), "1", "the NVIDIA driver did not answer within 0.3 s", True),
    ("cuda = '12.8'", None, "", None, None),
    ("hip = '6.2'", None, "2", None, None),  # the training will see
    ("", None, "2", "Slurm gave 2 GPUs, and torch 2.13.0 is built for the CPU", False),
])  # fmt: skip
def test_before_the_training(build, driver, promised, found, of_node, node, monkeypatch):
    node(build, driver)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", promised)
    if driver and driver[0]:
        monkeypatch.setattr(promised_devices, "DRIVER_SECONDS", 0.3)
    checks = list(check_promised())
    assert bool(checks) == bool(found)
    for check in checks:
        assert found in check.found and (check.state, check.of_node) == ("failure", of_node), check


def test_a_node_without_a_driver_is_left_out_of_the_next_life(node, genscale, run, in_job):
    node("cuda = '12.8'", None)
    in_job("7", SLURM_GPUS_ON_NODE="1")
    begun = genscale("slurm", "begin", run)
    assert begun.code == 11 and "node0 is not fit: promised GPUs: Slurm gave 1 GPU, and there is no NVIDIA driver" in begun.out
    assert genscale("slurm", "end", run, "--code", 11).code == 75
    assert (run / "jobs" / "exclude").read_text() == "node0"
    (life,) = read_lives(run)
    assert life.how == "unfit" and life.reason.startswith("node0: promised GPUs: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("build", "found", "code"), [("12.8", "sees none", 75), (None, "is built for other devices", 2)])
def test_the_training_refuses_before_its_first_step(build, found, code, genscale, tiny_config, tiny_run, in_job, monkeypatch):
    """Where the look before it could not tell, as with ROCm."""
    monkeypatch.setattr(torch.version, "cuda", build)
    in_job("7", GENSCALE_RUN=str(tiny_run))
    assert genscale("slurm", "begin", tiny_run).code == 0
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    message = genscale("train", "--config", tiny_config).message()
    assert message.startswith("node0 is not fit: promised GPUs: Slurm gave 1 GPU, and torch ") and found in message
    assert not (tiny_run / "metrics.jsonl").exists()
    assert genscale("slurm", "end", tiny_run, "--code", 1).code == code
    (life,) = read_lives(tiny_run)
    assert life.how == "unfit" and found in life.reason
    assert (tiny_run / "jobs" / "exclude").exists() == (code == 75)


@pytest.mark.parametrize("own_wish", [{"ACCELERATE_USE_CPU": "true"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_who_wants_the_cpu_gets_it(own_wish, in_job):
    in_job("7", SLURM_GPUS_ON_NODE="2", **own_wish)
    assert promised_gpus() == 0
