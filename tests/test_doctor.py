"""`genscale doctor` on machines with something wrong: real limits, real disks, real processes, real servers."""

from __future__ import annotations

import http.server
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genscale.cluster.checks import Check, bad_nodes, report, run_checks
from genscale.cluster.clocks import judge_clocks
from genscale.cluster.device_checks import check_driver
from genscale.cluster.doctor import job_check
from genscale.cluster.links import judge_links
from genscale.cluster.network_check import roll_call
from genscale.cluster.node_checks import Load, check_cores, check_extension_builds, check_limits, check_shared_memory
from genscale.cluster.shared_folder import answers, find_token, judge, leave_token
from genscale.cluster.slurm_task import adopt_slurm_task
from genscale.cluster.storage_checks import check_run_folder, existing, file_system

ROOT = Path(__file__).resolve().parents[1]


def one(checks: Any, name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def named(text: str, name: str) -> list[dict[str, Any]]:
    return [check for check in json.loads(text)["checks"] if check["name"] == name]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the PATH, for tools that this machine has not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_a_sound_machine_is_well_and_quick_loads_no_torch(tmp_path, genscale_process):
    done = genscale_process("doctor", "--quick", "--folder", tmp_path / "runs" / "new", PYTHONPROFILEIMPORTTIME="1")
    assert done.code == 0, done.out
    for name in ("versions", "GPUs", "CPU cores", "open files", "locked memory", "shared memory", "extension builds",
                 "disk space", "disk speed"):
        assert f"  {name} " in done.out, done.out
    assert not [line for line in done.err.splitlines() if line.split("|")[-1].strip() == "torch"]
    assert not list(tmp_path.iterdir())  # nothing is left behind, and no run folder is made


def test_json_says_what_the_text_says(tmp_path, genscale):
    done = genscale("doctor", "--quick", "--json", "--folder", tmp_path)
    said = json.loads(done.out)
    assert (said["state"] == "failure") == (done.code == 1)
    assert {"name", "state", "found", "remedy", "host", "of_node"} == said["checks"][0].keys()


def test_the_run_of_a_config_is_looked_at(genscale, tiny_config, tmp_path):
    done = genscale("doctor", "--json", "--config", tiny_config, "--data.source", tmp_path / "none.txt", "--data.workers", 64)
    assert done.code == 1
    (data,) = named(done.out, "data")
    assert data["state"] == "failure" and "no such file or folder" in data["found"] and "give an existing one" in data["remedy"]
    (cores,) = named(done.out, "CPU cores")
    assert cores["state"] == "warning" and "set data.workers to" in cores["remedy"]
    (space,) = named(done.out, "disk space")
    assert str(tmp_path) in space["found"]
    assert named(done.out, "W&B")[0]["found"] == "disabled"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--conifg", "x"], ["conifg"]), (["--processes", "0"], ["--processes", "at least 1"]),
    (["--config", "none.yaml"], ["--config", "none.yaml"]), (["--processes", "2", "--quick"], ["--processes: 2", "--quick"])])
def test_wrong_arguments_are_one_line(arguments, words, genscale):
    message = genscale("doctor", *arguments).message()
    assert all(word in message for word in words)


def test_half_a_launcher_is_refused_as_training_does(genscale, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert genscale("doctor").message().startswith("RANK: not set, although WORLD_SIZE is 2")


def test_help_names_every_flag(genscale):
    done = genscale("doctor", "--help")
    assert done.code == 0 and all(flag in done.out for flag in ("--quick", "--json", "--folder", "--processes", "--config"))


# --- a node -----------------------------------------------------------------------------------------------------------


def test_few_open_files_are_a_failure_that_names_the_command(tmp_path, genscale_process):
    def limited(*arguments: str) -> tuple[str, ...]:
        code = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {})); sys.argv[0] = 'genscale'\n" \
               "runpy.run_module('genscale', run_name='__main__')".format(*arguments)
        return (sys.executable, "-c", code)

    done = genscale_process("doctor", "--quick", "--json", "--folder", tmp_path, command=limited("100", "4096"))
    (files,) = named(done.out, "open files")
    assert (done.code, files["state"]) == (1, "failure") and files["remedy"] == "`ulimit -n 4096` before the run"


def test_enough_open_files_depend_on_the_run():
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


def test_little_shared_memory_matters_to_several_processes_and_workers(small_disk):
    folder = small_disk("64m")
    assert one(check_shared_memory(Load(), folder), "shared memory").state == "ok"
    for load in (Load(2, 2), Load(1, 1, 2)):
        (check,) = check_shared_memory(load, folder)
        assert check.state == "warning" and "--shm-size" in check.remedy
    (folder / "rest").write_bytes(b"0" * 2**26)
    (full,) = check_shared_memory(Load(2, 2), folder)
    assert full.state == "failure" and full.of_node


def test_a_killed_build_leaves_a_lock_that_is_named(tmp_path, monkeypatch):
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
def test_what_the_driver_says(rows, promised, state, words, tools, monkeypatch):
    lines = [ROW.format(index=index, used=used, errors=errors) for index, used, errors in rows]
    script = "\n".join(f"echo '{line}'" for line in lines)
    if rows[0][2] is None:  # a driver that does not know the field
        refusal = "case $* in *ecc*) echo 'Field \"ecc\" is not a valid field to query.'; exit 2;; esac"
        script = f"{refusal}\n{script.replace(', None', '')}"
    tool(tools, "nvidia-smi", script)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", promised)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (check,) = check_driver()
    assert check.state == state and all(word in check.found for word in words), check
    assert check.of_node == (state == "failure")


def test_a_driver_that_fails_or_hangs_is_the_nodes_fault(tools, monkeypatch):
    tool(tools, "nvidia-smi", "echo 'Unable to determine the device handle for GPU0: GPU is lost' >&2; exit 15")
    (lost,) = check_driver()
    assert lost.state == "failure" and lost.of_node and "GPU is lost" in lost.found
    tool(tools, "nvidia-smi", "exec sleep 30")
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


def test_disks(small_disk, tmp_path):
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


# --- data and W&B -----------------------------------------------------------------------------------------------------


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server on loopback that gives what lies in `<tmp_path>/web`."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_sources_are_asked(genscale, tiny_config, web, tmp_path):
    (tmp_path / "web" / "book.txt").write_text("One paragraph.\n\nAnother.")
    for source, state in ((f"{web}/book.txt", "ok"), (f"{web}/none.txt", "failure")):
        done = genscale("doctor", "--json", "--config", tiny_config, "--data.source", source)
        (data,) = named(done.out, "data")
        assert data["state"] == state and source in data["found"], data
    assert "404" in data["found"]


def test_a_mixture_and_pictures_are_asked_source_by_source(genscale, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.txt").write_text("")
    sources = f"[{{source: {tmp_path}/a.jsonl}}, {{source: {tmp_path}/empty.txt}}]"
    (tmp_path / "mix.yaml").write_text(f"data: {{sources: {sources}}}\ntracking: {{wandb: disabled}}\n")
    said = named(genscale("doctor", "--json", "--config", tmp_path / "mix.yaml", "--run.dir", tmp_path).out, "data")
    assert [check["state"] for check in said] == ["ok", "failure"] and "empty.txt" in said[1]["found"]
    pictures = ["--model.family", "vae", "--tracking.wandb", "disabled", "--run.dir", tmp_path]
    for source, state in (("digits", "ok"), (tmp_path / "none", "failure"), (tmp_path, "ok")):
        (data,) = named(genscale("doctor", "--json", *pictures, "--data.source", source).out, "data")
        assert data["state"] == state, data


def test_wandb(web, tmp_path):
    code = ("import os\nfrom genscale.errors import UserError\nfrom genscale.tracking.wandb_server import check_server\n"
            "try: check_server()\nexcept UserError as error: print(error)\n"
            "os.environ['WANDB_API_KEY'] = '0' * 40\nprint(check_server())\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "WANDB_BASE_URL": web}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    without, with_key = done.stdout.splitlines()
    assert "there is no key for it" in without and with_key == web


@pytest.mark.parametrize(("mode", "state", "words"), [
    ("disabled", "ok", "disabled"), ("offline", "ok", "genscale sync RUN"), ("online", "warning", "cannot be reached")])
def test_wandb_as_the_config_has_it(mode, state, words, genscale, tiny_config, monkeypatch):
    # Nothing listens on the discard port.
    monkeypatch.setattr("genscale.tracking.wandb_server.server_address", lambda: "http://127.0.0.1:9")
    (check,) = named(genscale("doctor", "--json", "--config", tiny_config, "--tracking.wandb", mode).out, "W&B")
    assert check["state"] == state and words in check["found"]
    assert ("set tracking.wandb to offline" in check["remedy"]) == (state == "warning")


# --- several nodes ----------------------------------------------------------------------------------------------------


def test_clocks():
    assert judge_clocks({"node0": 0.0, "node1": -0.2}, precision=0.05).state == "ok"
    odd = judge_clocks({"node0": 0.01, "node1": 0.0, "node2": 7.5}, precision=0.05)
    assert (odd.state, odd.host, odd.found) == ("warning", "node2", "node2 is 7.5 s ahead of node0")
    assert judge_clocks({"node0": 0.0, "node1": -100.0}, 0.05).found in ("node0 is 100.0 s ahead of node1",
                                                                        "node1 is 100.0 s behind node0")


# Starts what srun would start on each node, here: node1's clock is wrong, node2 cannot see the folder, node3 says nothing.
SRUN = """
arguments=(); for word; do case $word in --*) ;; *) arguments+=("$word");; esac; done
for node in node0 node1 node2 node3; do
  export SLURMD_NODENAME=$node CLOCK=0; words=("${arguments[@]}")
  case $node in node1) CLOCK=100;; node2) words[4]=/nonexistent;; node3) words=(false);; esac
  "${words[@]}" &
done
wait
"""
CLOCK = "import os, time\nnow, shift = time.time, float(os.environ.get('CLOCK', 0))\ntime.time = lambda: now() + shift\n"


def test_every_node_of_a_job_is_asked_and_the_bad_ones_are_named(tools, tmp_path, monkeypatch):
    tool(tools, "srun", SRUN)
    tool(tools, "scontrol", "[ \"$*\" = 'show hostnames node[0-3]' ] && printf 'node%d\\n' 0 1 2 3")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOCK)
    for name, value in {"SLURM_JOB_NODELIST": "node[0-3]", "SLURMD_NODENAME": "node0",
                        "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}"}.items():
        monkeypatch.setenv(name, value)
    checks = job_check(tmp_path / "run", seconds=30)
    assert bad_nodes(checks) == ["node2", "node3"], report(checks)
    assert one([check for check in checks if check.host == "node3"], "nodes").found.startswith("node3 did not answer")
    assert {check.host for check in checks if check.name == "disk speed"} == {"node0", "node1", "node2"}
    clocks = one(checks, "clocks")
    assert clocks.state == "warning" and clocks.found.startswith("node1 is ") and "ahead" in clocks.found
    assert not list(tmp_path.glob(".doctor-*"))


def test_a_job_whose_nodes_cannot_be_told_is_not_taken_for_one_node(tools, tmp_path, monkeypatch):
    tool(tools, "scontrol", "exit 1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-3]")
    (check,) = job_check(tmp_path)
    assert check.state == "failure" and "scontrol show hostnames" in check.found


def test_a_task_of_srun_knows_its_place(tools, monkeypatch):
    tool(tools, "scontrol", "printf 'node%d\\n' 0 1 2")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be undone
        monkeypatch.delenv(name)
    adopt_slurm_task()
    assert "RANK" not in os.environ  # in a batch script, or nowhere
    for name, value in {"SLURM_JOB_NODELIST": "node[0-2]", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
                        "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_JOB_ID": "77"}.items():
        monkeypatch.setenv(name, value)
    adopt_slurm_task()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert found == ["4", "5", "0", "1", "node0"] and 1024 < int(os.environ["MASTER_PORT"]) < 65536


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("genscale.cluster.network_check.PASSING_SECONDS", 0.0)
    answer, store = roll_call(0, 3, seconds=1)
    del store
    assert answer.state == "failure" and "rank 1, 2" in answer.found
    unreachable, _ = roll_call(1, 3, seconds=1)
    assert unreachable.state == "failure" and "rank 1 on" in unreachable.found and unreachable.of_node


def test_the_node_with_a_bad_network_has_two_slow_links():
    rates = {("node0", "node1"): 9e9, ("node1", "node2"): 1e9, ("node2", "node3"): 2e9, ("node3", "node4"): 8e9,
             ("node4", "node0"): 10e9}
    bad = judge_links(rates)
    assert (bad.state, bad.host) == ("warning", "node2") and "node1 to node2: 954 MiB/s" in bad.found
    assert "node2 to node3: 1,907" in bad.found and "about 7,629" in bad.found
    one_of_two = judge_links({**rates, ("node1", "node2"): 9e9})
    assert one_of_two.host == "" and "node2 to node3" in one_of_two.found
    assert judge_links(dict.fromkeys(rates, 5e9)).state == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_group_adds_up_right_and_looks_into_one_folder(shared, tmp_path, genscale_start, genscale_finish):
    """As on several machines, one command a node, by torchrun, which sets RANK: three that share a folder, or two of which the
    second has a disk of its own there."""
    own_disk = ("unshare", "--mount", "bash", "-c", f'mount -t tmpfs tmpfs {tmp_path} && exec "$@"', "node1")
    if not shared and subprocess.run([*own_disk, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount of its own for a process here")
    port, started, count = free_port(), [], 3 if shared else 2
    for node, before in enumerate([()] * 3 if shared else [(), own_disk]):
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--node_rank", str(node),
                    "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
        started.append(genscale_start("--module", "genscale", "doctor", "--json", "--folder", tmp_path,
                                      command=(*before, *torchrun), SLURMD_NODENAME=f"node{node}", GLOO_SOCKET_IFNAME="lo"))
    first, *others = (genscale_finish(process) for process in started)
    assert {done.code for done in (first, *others)} == {0}, first.err + others[0].err
    (reduced,), (met,) = named(first.out, "all-reduce"), named(first.out, "rendezvous")
    assert reduced["state"] != "failure" and f"gloo, {count} processes, 16 MiB" in reduced["found"]
    assert met["found"].startswith(f"{count} processes on {count} nodes: node0, node1")
    assert named(first.out, "clocks")[0]["state"] == "ok"
    assert len(named(first.out, "links")) == (1 if shared else 0)
    (folder,) = named(first.out, "shared folder")
    assert folder["state"] == ("ok" if shared else "warning"), folder
    assert {check["host"] for check in named(first.out, "disk speed")} == {f"node{node}" for node in range(count)}
    assert not any(done.out for done in others) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path, genscale_process):
    done = genscale_process("doctor", "--processes", 2, "--folder", tmp_path)
    assert done.code == 0, done.out + done.err
    assert "gloo, 2 processes" in done.out and "2 processes on 1 node" in done.out
