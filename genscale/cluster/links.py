"""The network from each node to the next: an all-reduce is as slow as its slowest link, and does not say which that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from genscale.cluster.checks import Check, count_of
from genscale.parallel.processes import Processes
from genscale.planning.measure import timed

GPU_BYTES, CPU_BYTES = 64 * 2**20, 4 * 2**20
SLOW_SHARE = 1 / 3
"""A link is slow that carries less than this share of what the links usually carry."""


def check_links(processes: Processes, hosts: list[str]) -> Iterator[Check]:
    """The speed between neighbours, one link at a time; from three nodes on, for of two none can be the odd one.

    Args:
        hosts: nodes of all ranks, in their order; the first process of each takes part. Called by all.
    """
    firsts = sorted(hosts.index(host) for host in {*hosts})
    if len(firsts) < 3:
        return
    size = GPU_BYTES if processes.device.type == "cuda" else CPU_BYTES
    tensor, rates = torch.zeros(size // 4, device=processes.device), {}
    for sender, receiver in zip(firsts, [*firsts[1:], firsts[0]], strict=True):
        for _ in range(2):  # the first time, the connection is made
            dist.barrier()
            seconds = timed(tensor, partial(_hand_over, processes, tensor, sender, receiver))
        if processes.rank == receiver:
            rates[hosts[sender], hosts[receiver]] = size / seconds
    yield judge_links({link: rate for each in processes.gather(rates) for link, rate in each.items()})


def _hand_over(processes: Processes, tensor: torch.Tensor, sender: int, receiver: int) -> None:
    if processes.rank == sender:
        dist.send(tensor, receiver)
    elif processes.rank == receiver:
        dist.recv(tensor, sender)


def judge_links(rates: Mapping[tuple[str, str], float]) -> Check:
    """Which link is much slower than the others, and whose it is: a node with a bad network has two of them.

    Args:
        rates: bytes a second by (from, to).
    """
    usual = median(rates.values())
    slow = {link: rate for link, rate in rates.items() if rate < SLOW_SHARE * usual}
    if not slow:
        return Check("links", "ok", f"{count_of(len(rates), 'link')} from node to node, {_mib(min(rates.values()))} to "
                     f"{_mib(max(rates.values()))} MiB/s")
    ends = [host for link in slow for host in link]
    odd = max(ends, key=ends.count) if len(slow) > 1 else ""
    listed = ", ".join(f"{a} to {b}: {_mib(rate)} MiB/s" for (a, b), rate in slow.items())
    remedy = f"have the network of {odd} looked at, and leave it out meanwhile (--exclude)" if odd else \
        "have the network between the two looked at"
    return Check("links", "warning", f"{listed}; the others have about {_mib(usual)}", remedy, odd)


def _mib(rate: float) -> str:
    return f"{rate / 2**20:,.0f}"
