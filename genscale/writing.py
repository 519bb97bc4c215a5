"""How files come into a folder that others may write to, or that somebody else has made: whole, under names that nobody could
foresee, and never through a link, which would lead to a file elsewhere."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from genscale.errors import UserError

_DRAFT = re.compile(r"\..+-[0-9a-f]{12}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Give a file this content (text as UTF-8), or leave it as it was. A link of that name is replaced, not followed.

    Raises:
        OSError: it cannot be written.
    """
    draft = write_draft(path, content)
    try:
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def write_draft(path: Path, content: str | bytes) -> Path:
    """A new hidden file beside `path` with this content, to be given that name later.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    draft = path.with_name(f".{path.name}-{secrets.token_hex(6)}")  # as _DRAFT has it
    try:
        with draft.open("xb") as file:  # which follows no link
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return draft


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """The place where a library may write what becomes `path` at the end: in a folder that is this process's own.

    Raises:
        OSError: there is no room for it.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as place:
        draft = Path(place) / path.name
        yield draft
        os.replace(draft, path)


def clear_drafts(folder: Path) -> None:
    """Delete what writers that were killed have left there. For folders that one process at a time writes to."""
    for draft in folder.glob(".*"):
        if draft.name.startswith(".new-") and draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        elif _DRAFT.fullmatch(draft.name):
            with contextlib.suppress(OSError):
                draft.unlink()


def no_link(path: str | Path, flags: int) -> int:
    """How `open` opens a file that is written piece by piece, as its `opener`.

    Raises:
        OSError: it cannot be written, or is a link or no plain file.
    """
    try:  # a named pipe would be waited for until somebody reads it
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, f"{Path(path).name} is a link, and nothing is written through one", str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{Path(path).name} is no plain file", str(path))
    return descriptor


class AppendedLog(logging.FileHandler):
    """A log file that is no link."""

    def _open(self) -> TextIOWrapper:
        # The mode of a log is one of text.
        return cast(TextIOWrapper, open(self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors,
                                        opener=no_link))


def make_folder(path: Path, parents: bool = False) -> None:
    """Make a folder inside a run folder where it is not there.

    Args:
        parents: make those above it too.

    Raises:
        UserError: it is a link.
        OSError: it cannot be made.
    """
    refuse_link(path)
    path.mkdir(parents=parents, exist_ok=True)


def refuse_link(path: Path) -> None:
    """Raises UserError where a folder inside a run folder is a link: what a run writes would land elsewhere."""
    if path.is_symlink():
        raise UserError(f"run.dir: {path} is a link, and nothing is written through one; put a folder in its place, or set "
                        "--run.dir to a folder (or link) on the other disk")


def write_seconds(folder: Path, size: int, named: str) -> float:
    """Of writing so many bytes, syncing them and giving the file its name, as a checkpoint does.

    Args:
        named: what the file's name begins with.

    Raises:
        OSError: the folder takes no file, or not one of that size.
    """
    probe = folder / f".{named}-{secrets.token_hex(4)}"
    block = os.urandom(2**20)  # file systems that compress gain nothing
    try:
        started = time.perf_counter()
        with probe.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        renamed = probe.rename(probe.with_suffix(".done"))
        seconds = time.perf_counter() - started
        probe = renamed
        return seconds
    finally:
        probe.unlink(missing_ok=True)
