"""`genscale doctor` on machines with something wrong: real limits, real disks, real processes, real servers."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from genscale.cluster.network_check import roll_call

ROOT = Path(__file__).resolve().parents[1]

def named(text: str, name: str) -> list[dict[str, Any]]:
    return [check for check in json.loads(text)["checks"] if check["name"] == name]


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


def test_few_open_files_are_a_failure_that_names_the_command(tmp_path, genscale_process):
    def limited(*arguments: str) -> tuple[str, ...]:
        code = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {})); sys.argv[0] = 'genscale'\n" \
               "runpy.run_module('genscale', run_name='__main__')".format(*arguments)
        return (sys.executable, "-c", code)

    done = genscale_process("doctor", "--quick", "--json", "--folder", tmp_path, command=limited("100", "4096"))
    (files,) = named(done.out, "open files")
    assert (done.code, files["state"]) == (1, "failure") and files["remedy"] == "`ulimit -n 4096` before the run"


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
    (tmp_path / "empty").mkdir()
    (tmp_path / "some").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "some" / "0.png")
    for source, state in (("digits", "ok"), *((tmp_path / name, state) for name, state in (
            ("none", "failure"), ("empty", "failure"), ("some", "ok")))):
        (data,) = named(genscale("doctor", "--json", *pictures, "--data.source", source).out, "data")
        assert data["state"] == state, data


def test_wandb(web, tmp_path, python_process):
    code = ("import os\nfrom genscale.errors import UserError\nfrom genscale.tracking.wandb_server import check_server\n"
            "try: check_server()\nexcept UserError as error: print(error)\n"
            "os.environ['WANDB_API_KEY'] = '0' * 40\nprint(check_server())\n")
    without, with_key = python_process(code, HOME=str(tmp_path), WANDB_BASE_URL=web).splitlines()
    assert "there is no key for it" in without and with_key == web


@pytest.mark.parametrize(("mode", "state", "words"), [
    ("disabled", "ok", "disabled"), ("offline", "ok", "genscale sync RUN"), ("online", "warning", "cannot be reached")])
def test_wandb_as_the_config_has_it(mode, state, words, genscale, tiny_config, monkeypatch):
    # Nothing listens on the discard port.
    monkeypatch.setattr("genscale.tracking.wandb_server.server_address", lambda: "http://127.0.0.1:9")
    (check,) = named(genscale("doctor", "--json", "--config", tiny_config, "--tracking.wandb", mode).out, "W&B")
    assert check["state"] == state and words in check["found"]
    assert ("set tracking.wandb to offline" in check["remedy"]) == (state == "warning")


# --- several processes ------------------------------------------------------------------------------------------------


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
