"""Whether a file that one node writes is seen by the others: without that, no checkpoint of several nodes comes together."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from genscale.cluster.checks import Check, count_of

PREFIX = ".doctor-"


def leave_token(folder: Path) -> str:
    """Write a file for the others to find; returns its token. Raises OSError."""
    token = secrets.token_hex(6)
    meeting = folder / f"{PREFIX}{token}"
    meeting.mkdir(parents=True)
    (meeting / "token").write_text(token)
    return token


def find_token(folder: Path, token: str, host: str, seconds: float = 10.0) -> bool:
    """Whether this node sees the file, and answers with one of its own. Network file systems remember for some seconds that a
    file was not there."""
    meeting, deadline = folder / f"{PREFIX}{token}", time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (meeting / "token").read_text() == token:
                (meeting / f"{host}.answer").write_text(token)
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def answers(folder: Path, token: str, wanted: set[str], seconds: float = 10.0) -> set[str]:
    """The nodes whose answers are seen by the one that left the token; waits for those that are `wanted`."""
    deadline = time.monotonic() + seconds
    while True:
        found = {path.stem for path in (folder / f"{PREFIX}{token}").glob("*.answer")}
        if wanted <= found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def clear_token(folder: Path, token: str) -> None:
    shutil.rmtree(folder / f"{PREFIX}{token}", ignore_errors=True)


def judge(folder: Path, own: str, seen: Mapping[str, bool], answered: set[str]) -> Iterator[Check]:
    """What became of the file that node `own` wrote.

    Args:
        seen: whether each node found it.
        answered: nodes whose answers came back.
    """
    blind = sorted(host for host, found in seen.items() if not found or host not in answered)
    others = len(seen) - (own in seen)
    if not blind:
        yield Check("shared folder", "ok", f"what {own} writes to {folder} is seen by {count_of(others, 'other node')}")
    elif len(blind) < others:  # the others do see it: these nodes have not mounted it
        for host in blind:
            yield Check("shared folder", "failure", f"{host} does not see what {own} writes to {folder}, and other nodes do",
                        "leave the node out (--exclude), and have the mount mended", host, of_node=True)
    else:
        yield Check("shared folder", "warning", f"a file that {own} writes to {folder} is not seen by {', '.join(blind)}: it "
                    "is not on a shared file system, and no checkpoint of several nodes would come together",
                    "set run.dir to a folder that all nodes share")
