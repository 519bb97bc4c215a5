"""What doctor says of a node with something wrong: real limits, real disks, real processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genscale.cluster.checks import Check, bad_nodes, report, run_checks
from genscale.cluster.device_checks import check_driver
from genscale.cluster.node_checks import Load, check_cores, check_extension_builds, check_limits, check_shared_memory
from genscale.cluster.shared_folder import answers, find_token, judge, leave_token
from genscale.cluster.storage_checks import check_run_folder, existing, file_system

ROOT = Path(__file__).resolve().parents[1]

# --- a node -----------------------------------------------------------------------------------------------------------


def test_enough_open_files_depend_on_the_run(one):
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    many = Load(world_size=max(soft, 1), processes=1)
    assert one(check_limits(Load()), "open files").state == "ok"
    assert one(check_limits(many), "open files").state != "ok"


def test_cores_are_those_that_this_process_may_use():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" \
           "from genscale.cluster.node_checks import *\n" \
           "for load in (Load(), Load(2, 2), Load(1, 1, 3)): print(*[(c.state, c.found, c.remedy) for c in check_cores(load)])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    alone, two, loaders = map(eval, done.stdout.splitlines())
    assert alone == ("ok", "1 core for 1 process", "")
    assert two[0] == "warning" and "start at most 1 process on this node" in two[2] and "2 cores" in two[2]
    assert loaders[0] == "warning" and "set data.workers to 0" in loaders[2] and "4 cores" in loaders[2]


def test_threads_count(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    (check,) = check_cores(Load())
    assert check.state == "warning" and check.remedy == f"set OMP_NUM_THREADS to {cores}"


def test_little_shared_memory_matters_to_several_processes_and_workers(small_disk, one):
    folder = small_disk("64m")
    assert one(check_shared_memory(Load(), folder), "shared memory").state == "ok"
    for load in (Load(2, 2), Load(1, 1, 2)):
        (check,) = check_shared_memory(load, folder)
        assert check.state == "warning" and "--shm-size" in check.remedy
    (folder / "rest").write_bytes(b"0" * 2**26)
    (full,) = check_shared_memory(Load(2, 2), folder)
    assert full.state == "failure" and full.of_node


def test_a_killed_build_leaves_a_lock_that_is_named(tmp_path, monkeypatch, one):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    assert one(check_extension_builds(), "extension builds").state == "ok"
    # As torch.utils.file_baton does while it builds.
    code = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('building', flush=True); time.sleep(60)"
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    builder.stdout.readline()
    building = one(check_extension_builds(), "extension builds")
    assert building.state == "ok" and "1 build under way" in building.found
    builder.kill()
    builder.wait()
    young = one(check_extension_builds(), "extension builds")
    assert young.state == "warning" and young.remedy == f"if no other node is building: rm {lock}"
    os.utime(lock, (0, 0))
    assert one(check_extension_builds(), "extension builds").remedy == f"rm {lock}"


ROW = "{index}, NVIDIA H100 80GB HBM3, 560.35, 81559, {used}, {errors}"


@pytest.mark.parametrize(("rows", "promised", "state", "words"), [
    ([(0, 4, 0), (1, 4, 0)], "2", "ok", ["2 x NVIDIA H100 80GB HBM3 (81,559 MiB)", "driver 560.35"]),
    ([(0, 4, 0)], "2", "failure", ["Slurm gave 2 GPUs", "shows 1"]),
    ([(0, 4, 0), (1, 4, 12)], "2", "failure", ["uncorrected memory errors on GPU 1"]),
    ([(0, 30000, 0), (1, 4, "[N/A]")], "2", "warning", ["30000 MiB of GPU 0"]),
    ([(0, 4, None)], "1", "ok", ["1 x NVIDIA H100"]),
])  # fmt: skip
def test_what_the_driver_says(rows, promised, state, words, tool, monkeypatch):
    lines = [ROW.format(index=index, used=used, errors=errors) for index, used, errors in rows]
    script = "\n".join(f"echo '{line}'" for line in lines)
    if rows[0][2] is None:  # a driver that does not know the field
        refusal = "case $* in *ecc*) echo 'Field \"ecc\" is not a valid field to query.'; exit 2;; esac"
        script = f"{refusal}\n{script.replace(', None', '')}"
    tool("nvidia-smi", script)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", promised)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (check,) = check_driver()
    assert check.state == state and all(word in check.found for word in words), check
    assert check.of_node == (state == "failure")


def test_a_driver_that_fails_or_hangs_is_the_nodes_fault(tool, monkeypatch):
    tool("nvidia-smi", "echo 'Unable to determine the device handle for GPU0: GPU is lost' >&2; exit 15")
    (lost,) = check_driver()
    assert lost.state == "failure" and lost.of_node and "GPU is lost" in lost.found
    tool("nvidia-smi", "exec sleep 30")
    monkeypatch.setattr("genscale.cluster.device_checks.DRIVER_SECONDS", 0.5)
    (hung,) = check_driver()
    assert hung.state == "failure" and "did not answer" in hung.found


def test_what_never_answers_is_a_failure_and_the_others_go_on(tmp_path):
    os.mkfifo(tmp_path / "disk")  # nobody writes to it: reading waits for ever, as from a file server that is gone

    def broken() -> Iterator[Check]:
        raise OSError("a tool of another kind")
        yield

    looks = [("slow", lambda: [Check("slow", "ok", (tmp_path / "disk").read_text())]),
             ("broken", broken), ("well", lambda: [Check("well", "ok", "fine")])]
    started = time.monotonic()
    slow, failed, well = run_checks(looks, seconds=0.5)
    assert time.monotonic() - started < 5
    assert slow.state == "failure" and "no answer" in slow.found and slow.of_node
    assert failed.state == "failure" and "a tool of another kind" in failed.found
    assert well.state == "ok"
    (tmp_path / "disk").write_text("the thread may end")


def test_a_report_says_once_what_several_nodes_say():
    same = [Check("disk", "warning", "slow", "move", host) for host in ("node1", "node2")]
    text = report([*same, Check("GPUs", "failure", "lost", "exclude it", "node2", of_node=True), Check("clocks", "ok", "fine")])
    assert text.count("slow") == 1 and "[node1, node2]" in text and text.count("-> move") == 1
    assert text.endswith("1 ok, 1 warning, 1 failure") and "[node2]" in text
    assert bad_nodes([*same, Check("GPUs", "failure", "lost", "", "node2", of_node=True)]) == ["node2"]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_disks(small_disk, tmp_path, one):
    assert existing(tmp_path / "runs" / "new") == tmp_path
    full = small_disk("2m")
    assert file_system(full) == "tmpfs"
    (check,) = check_run_folder(full / "run", size=2**23)
    assert check.state == "failure" and "No space left" in check.found
    little = small_disk("200m")
    (little / "checkpoints" / "step-00000002").mkdir(parents=True)
    (little / "checkpoints" / "step-00000002" / "weights").write_bytes(b"0" * 2**27)
    found = list(check_run_folder(little, size=2**23, nodes=2))
    space = one(found, "disk space")
    assert space.state == "failure" and "72 MiB free" in space.found and "a checkpoint takes 128 MiB" in space.found
    shared = one(found, "shared folder")
    assert shared.state == "warning" and "run.dir" in shared.remedy
    assert "shared folder" not in [check.name for check in check_run_folder(little, size=2**23)]
    assert {path.name for path in little.iterdir()} == {"checkpoints"}


def test_a_file_that_other_nodes_do_not_see(tmp_path):
    """node0 writes on one folder; node1 looks into the same, node2 into another one, as where its mount is missing."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    token = leave_token(here)
    seen = {host: find_token(folder, token, host, seconds=0.3)
            for host, folder in (("node0", here), ("node1", here), ("node2", elsewhere))}
    answered = answers(here, token, {"node0", "node1"}, seconds=0.3)
    (blind,) = judge(here, "node0", seen, answered)
    assert (blind.state, blind.host, blind.of_node) == ("failure", "node2", True)
    del seen["node1"]
    (local,) = judge(here, "node0", seen, answered)
    assert local.state == "warning" and "not on a shared file system" in local.found and "run.dir" in local.remedy
    assert next(judge(here, "node0", {"node0": True, "node1": True}, answered)).state == "ok"
