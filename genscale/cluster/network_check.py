"""What the processes of a group find out together: whether all are there, what an all-reduce comes to and how fast it is,
whether their clocks agree and whether they see one folder. Every function is called by all of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from genscale.cluster.checks import Check, count_of, host_name
from genscale.cluster.clocks import judge_clocks
from genscale.cluster.shared_folder import answers, clear_token, find_token, judge, leave_token
from genscale.cluster.storage_checks import existing
from genscale.errors import UserError
from genscale.parallel.processes import Processes
from genscale.planning.measure import timed

ROUNDS = 5
KEY = "genscale/doctor"
PASSING_SECONDS = 2.0
"""For the others to read the answer before its server is gone."""
GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
SLOW_GPU, SLOW_CPU = 2**30, 20 * 2**20
"""Bytes a second below which steps will wait for their all-reduce. (10 Gbit/s Ethernet gives NCCL about 1 GiB/s.)"""


def roll_call(rank: int, world_size: int, seconds: float) -> tuple[Check, dist.TCPStore | None]:
    """Whether all processes reach rank 0, before a library waits for them; on rank 0 the answer names those that are missing,
    and is passed on: where it is a failure, nobody needs to go on.

    The same address as the process group's is used, and the same server: it lives as long as the store that is returned beside
    the answer.
    """
    address, port, store = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), None
    try:
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store = dist.TCPStore(address, int(port), world_size, serves, timedelta(seconds=seconds), wait_for_workers=False,
                              multi_tenant=True)
        store.set(f"{KEY}/{rank}", host_name())
        if rank == 0:
            answer = _who_came(store, world_size, seconds)
            store.set(f"{KEY}/answer", json.dumps(answer.as_dict()))
            if answer.state == "failure":
                time.sleep(PASSING_SECONDS)
        else:
            store.wait([f"{KEY}/answer"], timedelta(seconds=2 * seconds))
            answer = Check.from_dict(json.loads(store.get(f"{KEY}/answer")))
        return answer, store
    except (RuntimeError, ValueError) as error:  # torch's own are RuntimeErrors
        return Check("rendezvous", "failure", f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port} "
                     f"({_first_line(error)})", "look at the network between the nodes; where they have several, name the one "
                     "to use (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)", host_name(), of_node=rank > 0), store


def _who_came(store: dist.TCPStore, world_size: int, seconds: float) -> Check:
    started, keys = time.monotonic(), [f"{KEY}/{rank}" for rank in range(world_size)]
    while not store.check(keys) and time.monotonic() - started < seconds:
        time.sleep(0.1)
    came = {rank: store.get(key).decode() for rank, key in enumerate(keys) if store.check([key])}
    missing = [rank for rank in range(world_size) if rank not in came]
    hosts = sorted({*came.values()})
    if missing:
        return Check("rendezvous", "failure", f"{len(missing)} of {world_size} processes did not come within {seconds:.0f} s: "
                     f"rank {', '.join(map(str, missing))}; there are processes on {', '.join(hosts)}", "look at the nodes "
                     "that are not named, and at the network to them")
    return Check("rendezvous", "ok", f"{count_of(world_size, 'process')} on {count_of(len(hosts), 'node')}: "
                 f"{', '.join(hosts)}")


def check_all_reduce(processes: Processes) -> Iterator[Check]:
    """The sum of what all processes hold, compared with the number it must be, and the time it takes."""
    device, count = processes.device, processes.world_size
    on_gpu = device.type == "cuda"
    size = GPU_BYTES if on_gpu else CPU_BYTES
    backend, want = dist.get_backend(), count * (count + 1) / 2
    tensor = torch.empty(size // 4, device=device)
    seconds, right = [], True
    for _ in range(ROUNDS):
        tensor.fill_(processes.rank + 1)
        dist.barrier()
        seconds.append(timed(tensor, lambda: dist.all_reduce(tensor)))
        right = right and bool((tensor == want).all())
    small = torch.zeros(1, device=device)
    latency = median(timed(small, lambda: dist.all_reduce(small)) for _ in range(20))
    wrong = [rank for rank, fine in enumerate(processes.gather(right)) if not fine]
    # What each link carries is 2 (n - 1) / n of the data, whatever the algorithm's number of processes (nccl-tests).
    rate = 2 * (count - 1) / count * size / min(processes.gather(median(seconds)))
    found = f"{backend}, {count_of(count, 'process')}, {size // 2**20} MiB: {rate / 2**20:,.0f} MiB/s on each link, " \
            f"{1000 * latency:,.2f} ms for one number"
    if wrong:
        yield Check("all-reduce", "failure", f"{found}; the sum is wrong on rank {', '.join(map(str, wrong))}",
                    "leave the nodes of these ranks out")
    elif rate < (SLOW_GPU if on_gpu else SLOW_CPU):
        yield Check("all-reduce", "warning", found, "name the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA); NCCL_DEBUG=INFO "
                    "says which it uses" if on_gpu else "name the fast network (GLOO_SOCKET_IFNAME)")
    else:
        yield Check("all-reduce", "ok", found)


def check_clocks(processes: Processes, hosts: list[str]) -> Iterator[Check]:
    """`hosts` are the nodes of all ranks, in their order."""
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier()
        now = time.time()
        rounds.append(processes.gather(now))
    spread = [[now - each[0] for now in each] for each in rounds]
    offsets = {host: median(each[rank] for each in spread) for rank, host in enumerate(hosts)}
    if len(offsets) > 1:
        yield judge_clocks(offsets, precision=0.05)


def check_shared_folder(processes: Processes, hosts: list[str], run_folder: Path) -> Iterator[Check]:
    """`hosts` are the nodes of all ranks, in their order; one process of each takes part in what is written."""
    if len({*hosts}) == 1:
        return

    def leave() -> tuple[Path, str]:
        folder = existing(run_folder)
        try:
            return folder, leave_token(folder)
        except OSError as error:
            raise UserError(f"run.dir: cannot write to {folder} ({error.strerror})") from None

    try:
        folder, token = processes.main_does(leave)
    except UserError as error:
        if processes.is_main:
            yield Check("shared folder", "failure", str(error), "set run.dir to a folder that can be written", host_name())
        return
    own = hosts[processes.rank]
    sees = find_token(folder, token, own) if hosts.index(own) == processes.rank else None
    seen = {host: found for host, found in zip(hosts, processes.gather(sees), strict=True) if found is not None}
    if processes.is_main:
        yield from judge(folder, own, seen, answers(folder, token, {host for host, found in seen.items() if found}))
        clear_token(folder, token)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
