"""What doctor finds out between the nodes of a job."""

from __future__ import annotations

import os
from pathlib import Path

from genscale.cluster.checks import bad_nodes, report
from genscale.cluster.clocks import judge_clocks
from genscale.cluster.doctor import job_check
from genscale.cluster.links import judge_links
from genscale.cluster.slurm_task import adopt_slurm_task

ROOT = Path(__file__).resolve().parents[1]



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


def test_every_node_of_a_job_is_asked_and_the_bad_ones_are_named(tool, tmp_path, monkeypatch, one):
    tool("srun", SRUN)
    tool("scontrol", "[ \"$*\" = 'show hostnames node[0-3]' ] && printf 'node%d\\n' 0 1 2 3")
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


def test_a_job_whose_nodes_cannot_be_told_is_not_taken_for_one_node(tool, tmp_path, monkeypatch):
    tool("scontrol", "exit 1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-3]")
    (check,) = job_check(tmp_path)
    assert check.state == "failure" and "scontrol show hostnames" in check.found


def test_a_task_of_srun_knows_its_place(tool, monkeypatch):
    tool("scontrol", "printf 'node%d\\n' 0 1 2")
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


def test_the_node_with_a_bad_network_has_two_slow_links():
    rates = {("node0", "node1"): 9e9, ("node1", "node2"): 1e9, ("node2", "node3"): 2e9, ("node3", "node4"): 8e9,
             ("node4", "node0"): 10e9}
    bad = judge_links(rates)
    assert (bad.state, bad.host) == ("warning", "node2") and "node1 to node2: 954 MiB/s" in bad.found
    assert "node2 to node3: 1,907" in bad.found and "about 7,629" in bad.found
    one_of_two = judge_links({**rates, ("node1", "node2"): 9e9})
    assert one_of_two.host == "" and "node2 to node3" in one_of_two.found
    assert judge_links(dict.fromkeys(rates, 5e9)).state == "ok"
