"""Whether the clocks of the nodes agree: logs and time stamps of a run contradict each other where they do not."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median_low

from genscale.cluster.checks import Check, count_of

SKEW_SECONDS = 1.0


def server_offset(folder: Path) -> float:
    """Seconds by which this node's clock is ahead of that by which the folder's file server dates its files. Where the node
    dates them itself, zero. Raises OSError."""
    probe = folder / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch()
        os.utime(probe)
        return time.time() - probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def judge_clocks(offsets: Mapping[str, float], precision: float) -> Check:
    """How far the clocks are apart.

    Args:
        offsets: of each node's clock from any common one, seconds.
        precision: of these, seconds.
    """
    usual = median_low(offsets.values())
    reference = next(host for host, offset in offsets.items() if offset == usual)
    odd = max(offsets, key=lambda host: abs(offsets[host] - usual))
    apart = offsets[odd] - usual
    if abs(apart) > max(SKEW_SECONDS, precision):
        return Check("clocks", "warning", f"{odd} is {abs(apart):,.1f} s {'ahead of' if apart > 0 else 'behind'} {reference}",
                     "have its clock set by the network (chronyc tracking; timedatectl)", odd)
    return Check("clocks", "ok", f"{count_of(len(offsets), 'node')} within {max(abs(apart), precision):.2f} s")
