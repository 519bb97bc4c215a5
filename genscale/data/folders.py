"""One walk of a folder for text and images alike, and what its names say about training and validation.

Links are followed, but every folder and every file is read once; what is hidden or no plain file is never opened. Whatever was
left out is said in one line.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, NamedTuple

from genscale.errors import UserError, as_utf8
from genscale.printable import printable

LOG = logging.getLogger(__name__)
HIDDEN = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}
"""What systems leave in folders besides names that begin with a dot."""
SHOWN = 3
"""Names given as examples of what was left out."""
TRAINING = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "eval", "test", "testing")
"""What the parts of a source are called, the one to be preferred first."""
_PARTS = "|".join((*TRAINING, *VALIDATION))
_WORD = re.compile(rf"({_PARTS})(?![a-z])", re.IGNORECASE)
_WHOLE = re.compile(rf"({_PARTS})([-_.]?\d+([-_.]of[-_.]\d+)?)?(\.[a-z0-9]{{1,8}})*", re.IGNORECASE)


class File(NamedTuple):
    """A file of a walk.

    Attributes:
        name: its path below the root, with slashes, as the system has it: see `as_utf8`.
        size: bytes.
        kind: what the walk was told to call it.
        identity: the same for all paths that lead to it.
    """

    name: str
    size: int
    kind: str
    identity: int


@dataclass
class Folder:
    """What was found below a folder: `files` sorted by name; `left_out` names by the reason, `others` counts by ending."""

    where: str
    files: list[File] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)

    def of(self, kind: str) -> list[File]:
        """The files of a kind."""
        return [file for file in self.files if file.kind == kind]

    def rest(self) -> str:
        """What was left out, in words; empty where nothing was."""
        said = [f"{len(names):,} {why if len(names) == 1 else plural} ({examples(names)})"
                for why, plural in REASONS.items() if (names := self.left_out.get(why))]
        if self.others:
            endings = " ".join(ending for ending, _ in self.others.most_common(8))
            count = self.others.total()
            said.append(f"{count:,} file{'s' * (count > 1)} of other kinds ({endings}{' ...' * (len(self.others) > 8)})")
        return f"left out {', '.join(said)}" if said else ""

    def say(self) -> None:
        """Log what was left out, if anything was."""
        if said := self.rest():
            LOG.log(logging.WARNING if self.left_out.keys() - {INVISIBLE} else logging.INFO, "%s: %s", self.where, said)


NOWHERE, AGAIN, SPECIAL, INVISIBLE = ("dangling link", "link to what is read already", "pipe, socket or device",
                                      "hidden file or folder")
REASONS = {NOWHERE: "dangling links", AGAIN: "links to what is read already", SPECIAL: "pipes, sockets or devices",
           INVISIBLE: "hidden files or folders"}


def is_hidden(name: str) -> bool:
    """Whether what is called so is left out of a walk."""
    return name.startswith(".") or name in HIDDEN


def walk(root: Path, kind_of: Callable[[str], str | None], where: str) -> Folder:
    """What lies below a folder. Real folders come before links, so that a file has the name of the place where it lies.

    Args:
        kind_of: kind of a file by its name, or None for one that is not wanted.
        where: the source, as `key=value`, for messages.

    Raises:
        UserError: something in it may not be looked at.
    """
    found = _Walk(root, kind_of, where)
    found.read("", root)
    while found.links:
        found.follow_to_folders()
    found.follow_to_files()
    if found.refused:
        raise unreadable(where, found.refused)
    found.folder.files.sort()
    return found.folder


def unreadable(where: str, refused: Sequence[OSError]) -> UserError:
    """The error for what the system does not let one read. (Left out, it would make another run of the same command.)"""
    more = f" and {len(refused) - 1:,} more" if len(refused) > 1 else ""
    return UserError(f"{where}: cannot be read ({refused[0]}{more}); mend its permissions, or remove it")


class _Walk:
    """A walk under way. `links` are to be looked at, `linked` lead to files, `refused` could not be looked at."""

    def __init__(self, root: Path, kind_of: Callable[[str], str | None], where: str) -> None:
        self.folder, self._kind_of = Folder(where), kind_of
        self.links: list[tuple[str, str]] = []
        self.linked: list[tuple[str, os.stat_result]] = []
        self.refused: list[OSError] = []
        # A link to where the root lies leads back to it, and to what nobody has named.
        self._seen = {identity(above) for above in Path(os.path.realpath(root)).parents}

    def read(self, name: str, path: str | Path) -> None:
        """A folder and all real folders below it."""
        waiting = [(name, str(path))]
        while waiting:
            name, path = waiting.pop()
            try:
                found = identity(path)
                if found in self._seen:
                    self._leave_out(AGAIN, name)
                    continue
                self._seen.add(found)
                with os.scandir(path) as entries:
                    for entry in entries:
                        self._look(entry, f"{name}/{entry.name}" if name else entry.name, waiting)
            except OSError as error:
                self.refused.append(error)

    def _look(self, entry: os.DirEntry, name: str, waiting: list[tuple[str, str]]) -> None:
        directory = entry.is_dir(follow_symlinks=False)
        if is_hidden(entry.name):
            if directory or self._kind_of(name):
                self._leave_out(INVISIBLE, name)
        elif directory:
            waiting.append((name, entry.path))
        elif entry.is_symlink():
            self.links.append((name, entry.path))
        elif not entry.is_file(follow_symlinks=False):
            self._leave_out(SPECIAL, name)
        elif self._wanted(name):
            self._take(name, entry.stat(follow_symlinks=False))

    def follow_to_folders(self) -> None:
        """The links found so far. Those in the folders that they lead to come next."""
        links, self.links = sorted(self.links, key=_depth), []  # a folder reached twice is what its shortest name says
        for name, path in links:
            try:
                found = os.stat(path)
            except PermissionError as error:
                self.refused.append(error)
            except OSError:  # no such file, or a link to itself
                self._leave_out(NOWHERE, name)
            else:
                if S_ISDIR(found.st_mode):
                    self.read(name, path)
                else:
                    self.linked.append((name, found))

    def follow_to_files(self) -> None:
        """The links that lead to files, once all folders are known."""
        files = {file.identity for file in self.folder.files} if self.linked else set()
        for name, found in sorted(self.linked, key=_depth):
            if not S_ISREG(found.st_mode):
                self._leave_out(SPECIAL, name)
            elif self._wanted(name):
                if _identity(found) in files:
                    self._leave_out(AGAIN, name)
                else:
                    files.add(_identity(found))
                    self._take(name, found)

    def _wanted(self, name: str) -> bool:
        if self._kind_of(name):
            return True
        self.folder.others[os.path.splitext(as_utf8(name))[1].lower() or "no ending"] += 1
        return False

    def _take(self, name: str, found: os.stat_result) -> None:
        self.folder.files.append(File(name, found.st_size, self._kind_of(name) or "", _identity(found)))

    def _leave_out(self, why: str, name: str) -> None:
        self.folder.left_out.setdefault(why, []).append(name)


def _depth(link: tuple[str, Any]) -> tuple[int, str]:
    return link[0].count("/"), link[0]


def _identity(found: os.stat_result) -> int:
    return found.st_dev << 64 | found.st_ino


def identity(path: str | Path) -> int:
    """The same for all paths that lead to one file. Raises OSError."""
    return _identity(os.stat(path))


def examples(names: Iterable[str]) -> str:
    """Some of the names, for messages."""
    first = nsmallest(SHOWN + 1, names)
    return ", ".join(printable(as_utf8(name)) for name in first[:SHOWN]) + ", ..." * (len(first) > SHOWN)


def divided(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which of the names that stand beside each other are a training and which a validation set, by their first word (train,
    Train2017, test-00000-of-00002, ...); none where there are not both.

    A name that goes on after the word (test_tube) is one only where all the others are.
    """
    names = list(names)
    whole = [name for name in names if _WHOLE.fullmatch(name)]
    words = {name: found[1].lower() for name in names if (found := _WORD.match(name))}
    if len(words) < len(names):
        words = {name: words[name] for name in whole}
    training, validation = (next(([name for name in names if words.get(name) == word] for word in known
                                  if word in words.values()), []) for known in (TRAINING, VALIDATION))
    return (training, validation) if training and validation else ([], [])


def parted(files: Sequence[File], where: str) -> tuple[list[File], list[File]]:
    """Files to train on and those to validate on, by `divided` names where they part ways; the others are said."""
    names = [file.name for file in files]
    below = os.path.commonpath([name.rpartition("/")[0] for name in names])
    start = len(below) + 1 if below else 0
    tops = [name[start:].partition("/")[0] for name in names]
    training, validation = map(set, divided(dict.fromkeys(tops)))
    if not training:
        return list(files), []
    say_parts(where, training, validation, set(tops) - training - validation)
    return ([file for file, top in zip(files, tops, strict=True) if top in training],
            [file for file, top in zip(files, tops, strict=True) if top in validation])


def say_parts(where: str, training: Iterable[str], validation: Iterable[str], others: Collection[str]) -> None:
    """Log what is trained on, what is held out, and what is neither (a warning)."""
    rest = f"; what else is there is not read ({examples(others)})" if others else ""
    LOG.log(logging.WARNING if others else logging.INFO, "%s: %s is trained on, %s held out for validation%s", where,
            examples(training), examples(validation), rest)


def say_seen(validation: str, training: str, seen: Iterable[Any], trained: Iterable[Any]) -> bool:
    """Warn where what is validated on is also trained on. Returns whether it is.

    Args:
        validation, training: the sources, as `key=value`.
        seen, trained: what each reads: see `identity`.
    """
    seen, trained = set(seen), set(trained)
    if both := len(seen & trained):
        part = "all of it is" if both == len(seen) else f"{both:,} of its {len(seen):,} files are"
        LOG.warning("%s: %s trained on too (%s), so that its loss says nothing about what the model has not seen; give "
                    "another, or leave it out", validation, part, training)
    return both > 0


def say_repeated(locations: Sequence[str], key: str) -> None:
    """Warn of what stands twice in a list."""
    seen: dict[str, str] = {}
    for location in locations:
        place = location if "://" in location else os.path.realpath(os.path.expanduser(location))
        if place in seen:
            LOG.warning("%s: %s is listed twice (as %s) and is read twice", key, as_utf8(location), as_utf8(seen[place]))
        seen.setdefault(place, location)


def refuse_no_file(path: Path, where: str) -> None:
    """Raises UserError for a pipe, a socket or a device, which is not even opened."""
    if path.is_file() or path.is_dir() or not path.exists():
        return
    what = "a named pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"
    raise UserError(f"{where}: is {what}, which can be read but once, if at all; write its content to a file, and give that")
