"""Which nodes of a job are fit to train on, as each has said in `<run folder>/jobs/nodes/<node>.json` in this life."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genscale.cluster.checks import Check, host_name
from genscale.cluster.job_nodes import compare_nodes
from genscale.cluster.lives import one_line, read_record, write_record
from genscale.writing import write_whole

NAMED = 4
"""Nodes in a line."""
OF_THE_DISK = ("run folder", "disk space")
"""Checks whose failure may be over in a while, and that has nothing to do with the node."""


@dataclass(frozen=True)
class Verdict:
    """What the nodes have said, taken together.

    Attributes:
        faults: what is wrong, by node.
        silent: nodes that have said nothing.
        warnings: what is worth a line.
        excluded: nodes whose own fault it is, so that the job is not to be given them again.
        disk_only: nothing is wrong but the disk of the run folder.
    """

    faults: dict[str, str]
    silent: tuple[str, ...]
    warnings: tuple[str, ...]
    excluded: tuple[str, ...]
    disk_only: bool

    @property
    def reason(self) -> str | None:
        """Why the job cannot train on these nodes, in a line; None where it can."""
        found: dict[str, list[str]] = {}  # nodes by what they have
        for node, fault in [*self.faults.items(), *((node, "has not reported") for node in self.silent)]:
            found.setdefault(fault, []).append(node)
        said = [f"{', '.join(nodes[:NAMED])}{f' and {len(nodes) - NAMED} more' if len(nodes) > NAMED else ''}: {fault}"
                for fault, nodes in found.items()]
        return one_line("; ".join(said)) or None


def report(run: Path, job: str, restart: int, checks: Sequence[Check], clock: float) -> None:
    """Say what was found on this node. Raises OSError.

    Args:
        clock: seconds by which it is ahead of the file server's.
    """
    failed = [check for check in checks if check.state == "failure"]
    write_record(_file(run, host_name()), {
        "job": job, "restart": restart, "failures": [f"{check.name}: {check.found}" for check in failed],
        "at_fault": any(check.of_node for check in failed),
        "disk_only": bool(failed) and all(check.name in OF_THE_DISK for check in failed),
        "clock": clock, "versions": [check.as_dict() for check in checks if check.name == "versions"]})


def report_fault(run: Path, job: str, restart: int, fault: str, of_node: bool) -> None:
    """Say that this node has turned out not to be fit after all."""
    with contextlib.suppress(OSError):  # a full disk; the line in the log says it too
        said = _said(run, host_name(), job, restart) or {"job": job, "restart": restart, "clock": 0.0, "versions": []}
        write_record(_file(run, host_name()), {**said, "failures": [fault], "at_fault": of_node, "disk_only": False})


def judge(run: Path, nodes: Sequence[str], job: str, restart: int, seconds: float) -> Verdict:
    """Read what the nodes have said. A fault that all of them have is no node's own.

    Args:
        seconds: to wait for what they say.
    """
    reports = _reports(run, nodes, job, restart, seconds)
    faults = {node: list(report["failures"]) for node, report in reports.items()}
    at_fault = {node for node, report in reports.items() if report["at_fault"]}
    disk_only = all(report.get("disk_only") for report in reports.values() if report["failures"])
    versions = {node: [Check.from_dict(fields) for fields in report["versions"]] for node, report in reports.items()}
    warnings = []
    for check in compare_nodes(versions, {node: report["clock"] for node, report in reports.items()}):
        if check.state == "failure":
            faults[check.host].append(f"{check.name}: {check.found}")
            at_fault.add(check.host)
            disk_only = False
        elif check.state == "warning":
            warnings.append(f"{check.name}: {check.found}; {check.remedy}")
    silent = tuple(node for node in nodes if node not in reports)
    excluded = tuple(sorted({*silent, *at_fault}))
    alone = len(excluded) < len(nodes) or len(nodes) == 1
    unshared = 1 < len(silent) == len(nodes) - 1  # where the others write is another disk
    return Verdict({node: "; ".join(found) for node, found in faults.items() if found}, silent, tuple(warnings),
                   excluded if alone and not unshared else (), disk_only and not silent)


def exclude(run: Path, nodes: Sequence[str]) -> None:
    """Nodes that the job is not to be given again, for its script. Raises OSError."""
    if nodes:
        write_whole(run / "jobs" / "exclude", ",".join(nodes))


def _reports(run: Path, nodes: Sequence[str], job: str, restart: int, seconds: float) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while True:
        found = {node: said for node in nodes if (said := _said(run, node, job, restart))}
        if len(found) == len(nodes) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _said(run: Path, node: str, job: str, restart: int) -> dict[str, Any] | None:
    said = read_record(_file(run, node))
    if not said or (said.get("job"), said.get("restart")) != (job, restart):
        return None
    return said if {"failures", "at_fault", "clock", "versions"} <= said.keys() else None


def _file(run: Path, node: str) -> Path:
    return run / "jobs" / "nodes" / f"{node}.json"
