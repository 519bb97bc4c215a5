"""A calibration measures this machine, and what it writes is a profile like any other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from genscale.parallel.processes import Processes
from genscale.planning.calibrate import calibrate, write_profile
from genscale.planning.profiles import as_dict, profile


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path: Path):
    """In figures that a processor can have, however busy it is; the file is read back equal."""
    machine = calibrate(Processes(), ["here"], tmp_path, seconds=1.0)
    assert machine.device == "cpu" and machine.origin.startswith("measured on cpu")
    assert not list(tmp_path.iterdir()) and machine.disk > 0
    write_profile(machine, tmp_path / "mine.json")
    assert as_dict(profile(f"mine={tmp_path / 'mine.json'}")) == as_dict(machine)
    assert 1e8 < machine.peak("fp32") * machine.product < 1e14  # a core does 1e10 and more, a busy machine less
    assert 0 < machine.memory <= 1 and 1e8 < machine.memory_bandwidth < 1e13 and 1e-7 < machine.launch < 1e-2
    assert machine.gpus_per_node == 1


LINKS = """
import json, sys
from pathlib import Path
from genscale.parallel.processes import Processes
from genscale.planning.account import Exchange, Machine
from genscale.planning.calibrate import calibrate
from genscale.planning.measure import all_reduce_seconds
from genscale.planning.time import exchange_seconds
import torch

folder, processes = Path(sys.argv[1]), Processes()
for hosts, within in ((["a", "a"], True), (["a", "b"], False)):
    machine = calibrate(processes, hosts, folder, seconds=0.5)
    summed = Exchange("all_reduce", "", "backward", 4 * 2**20, 2, within, False, 1)
    told = exchange_seconds(summed, Machine("mine", 2, 2 if within else 1), machine)
    taken = max(processes.gather(all_reduce_seconds(torch.zeros(2**20), 5)))
    if processes.is_main:
        print(json.dumps({"told": told, "taken": taken, "link": machine.link_share, "network": machine.network_share,
                          "per_node": machine.gpus_per_node}))
processes.close()
"""


@pytest.mark.slow
def test_links_are_measured_inside_and_between_nodes(tmp_path: Path, genscale_process):
    """Two processes, which are told that they share a node, and then that they do not: what a smaller all-reduce takes is told
    from a larger one."""
    (tmp_path / "script.py").write_text(LINKS)
    done = genscale_process(2, tmp_path / "script.py", tmp_path, command=(sys.executable, "-m", "genscale.testing.group"))
    assert done.code == 0, done.err
    inside, between = map(json.loads, done.out.splitlines())
    assert (inside["link"], inside["network"], inside["per_node"]) == (1.0, 0.8, 2)
    assert (between["link"], between["network"], between["per_node"]) == (0.8, 1.0, 1)
    for found in (inside, between):
        assert 0.1 < found["told"] / found["taken"] < 10, found
