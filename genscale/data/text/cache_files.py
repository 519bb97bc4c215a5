"""Whether the files that a token cache was made of are what they were: an edit may keep a file's name, size and even its time.

A file whose time of change is the one last seen is taken for the same. Else it may have been edited, or merely copied to
another machine: its content tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.reading import read_json
from genscale.writing import write_whole

FILES, SEEN = "files.json", "files.seen"
DIGESTED_BYTES = 2 * 2**30
"""Files of more bytes in all are told apart by their times of writing, not by content: reading them would hold up the start."""


def check_files(folder: Path, files: Sequence[tuple[str, str]], key: str) -> None:
    """Compare the files with what they were when the cache was made; note it where that is not yet known.

    Args:
        folder: of the cache.
        files: (name in the source, path) of each local file.
        key: the setting that names the folder, for messages.

    Raises:
        UserError: one was changed.
    """
    if not files:
        return
    stats = [os.stat(path) for _, path in files]
    stamp = _digest([(name, one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino)
                     for (name, _), one in zip(files, stats, strict=True)])
    with suppress(OSError):
        if stamp in (folder / SEEN).read_text().split():
            return
    digested = sum(one.st_size for one in stats) <= DIGESTED_BYTES
    now = [_content(path) for _, path in files] if digested else [one.st_mtime_ns for one in stats]
    try:
        known = read_json(folder / FILES)
    except (OSError, ValueError):
        known = None
    if isinstance(known, list) and len(known) == len(now):
        for (name, path), was, one in zip(files, known, now, strict=True):
            if was != one:
                raise _changed(f"{key}={folder}", name, path, was)
    with suppress(OSError):  # a cache that is only read
        if known is None:
            write_whole(folder / FILES, json.dumps(now))
        with open(folder / SEEN, "a") as seen:
            seen.write(f"{stamp}\n")


def _changed(where: str, name: str, path: str, was: Any) -> UserError:
    if isinstance(was, str):
        return UserError(f"{where}: the cache of another source: {name} was edited since, though its size is the same; remove "
                         "the cache, or set another folder")
    touch = f"touch -d @{was // 10**9}.{was % 10**9:09} {shlex.quote(path)}"
    return UserError(f"{where}: {name} was written again since the cache was made, though its size is the same; remove the "
                     f"cache if it was edited; if it was copied, give it its time back ({touch}), and copy with times next "
                     "(cp -p, rsync -t)")


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
