"""Which code runs: the commit it is of, and the copy of it that a job keeps (genscale.cluster.snapshot). Loads no torch."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from pathlib import Path

import genscale

ROOT = Path(genscale.__file__).resolve().parents[1]
COMMIT_FILE = "commit"
"""In a job's copy of the code, which is no checkout: what `commit` said where it was made."""
_COPY = re.compile(r"code-([0-9a-f]{12}(?:-[0-9]+)?)")


@functools.cache
def commit() -> str | None:
    """The commit of the code that runs, with "-dirty" where files differ from it; None outside a checkout of its own."""
    return commit_of(ROOT)


@functools.cache
def snapshot() -> str | None:
    """The digest of the job's copy of the code that runs; None where it runs from anywhere else."""
    return snapshot_of(ROOT)


def commit_of(root: Path) -> str | None:
    """As `commit`, of the code in that folder."""
    if snapshot_of(root):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (root / COMMIT_FILE).read_text().strip() or None
        return None
    if not (root / ".git").exists():  # installed, perhaps within the checkout of something else
        return None
    named = _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if not named or named.endswith("-dirty"):
        return named or None
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", genscale.__name__)  # of which describe knows nothing
    return f"{named}-dirty" if new else named


def snapshot_of(root: Path) -> str | None:
    """As `snapshot`, of the code in that folder."""
    found = _COPY.fullmatch(root.name)
    return found[1] if found and (root / COMMIT_FILE).is_file() else None


def in_words(commit: str | None, snapshot: str | None) -> str:
    """"commit 1a2b3c4d5+changes, snapshot 0123456789ab", or what there is of it."""
    name, _, dirty = (commit or "").partition("-")
    return ", ".join([*([f"commit {name[:9]}{dirty and '+changes'}"] if name else []),
                      *([f"snapshot {snapshot}"] if snapshot else [])])


def code_in(root: Path) -> str:
    """That in words."""
    return in_words(commit_of(root), snapshot_of(root))


def _git(root: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
