"""rewards-<rank>.jsonl in a run folder: what judges have said that may say something else when they are asked again.

A line is written before the reward is used, so that a run that goes on, on however many processes, takes what was said then.
An answer is known by its address (scope, step, sample, member) and the hash of its content: a line of another answer at the
same address, which a run of another shape has written, is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from genscale.errors import CheckpointNotWritten
from genscale.reading import Unreadable, open_plain
from genscale.rewards.base import Answer
from genscale.writing import no_link

log = logging.getLogger("genscale")
LONGEST = 2**16
"""Bytes of a line."""


class Address(NamedTuple):
    """Where an answer stands in a run."""

    scope: str
    step: int
    sample: int
    member: int


def hash_of(answer: Answer) -> str:
    """The hash of what was asked and answered."""
    words = json.dumps([answer.prompt, answer.text, answer.ended], ensure_ascii=True)
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


class Journal:
    """What has been said, and this process's file.

    Args:
        folder: the run folder.
        rank: of this process.
        step: the last one done; what was said before it is not asked for any more.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> journal = Journal(folder, rank=0, step=0)
        >>> journal.keep("program", [(Address("train", 1, 7, 0), "c0ffee", 0.5)])
        >>> Journal(folder, rank=1, step=0).said("program", Address("train", 1, 7, 0), "c0ffee")
        0.5
    """

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        self._folder, self._path = folder, folder / f"rewards-{rank:05d}.jsonl"
        self._file: BinaryIO | None = None
        self._said: dict[tuple[str, Address], dict[str, float]] = {}
        self._step = step
        self._has_warned = False
        self._read()

    def said(self, name: str, address: Address, content: str) -> float | None:
        """What the judge of that name has said of this answer; None where it was not asked, or of another answer."""
        known = self._said.get((name, address), {})
        if known and content not in known and not self._has_warned:
            self._has_warned = True
            log.warning("%s: the answer recorded of step %d, sample %s, answer %d is another one, as of a run on another "
                        "number of processes; what differs is judged anew", self._path.name, address.step,
                        f"{address.sample:,}", address.member)
        return known.get(content)

    def keep(self, name: str, judged: Sequence[tuple[Address, str, float]]) -> None:
        """Write down what the judge says of answers: address, hash, reward. Returns when the disk has it.

        Raises:
            CheckpointNotWritten: there is no room, or the disk fails.
        """
        lines = [json.dumps({"scope": address.scope, "step": address.step, "sample": address.sample, "member": address.member,
                             "hash": content, "name": name, "reward": reward}) for address, content, reward in judged]
        try:
            file = self._open()
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointNotWritten(f"{self._path}: cannot be written ({error.strerror}), and a reward that may be another "
                                       "when it is asked for again is not used before it is; free some space, and start the "
                                       "run again") from None
        for address, content, reward in judged:
            self._said.setdefault((name, address), {})[content] = reward

    def at(self, step: int) -> None:
        """The run is at this step: what was said before is forgotten; where it has gone back, what is written is read again."""
        if step < self._step:
            self._step = step
            self._read()
        elif step > self._step:
            self._step = step
            self._said = {key: said for key, said in self._said.items() if key[1].step >= step}

    def close(self) -> None:
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            is_new = not self._path.exists()
            self._file = open(self._path, "ab", opener=no_link)  # noqa: SIM115 (open to the end)
            if is_new:
                folder = os.open(self._folder, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            elif not _ends_a_line(self._path):  # a process was killed as it wrote
                self._file.write(b"\n")
        return self._file

    def _read(self) -> None:
        self._said = {}
        for path in sorted(self._folder.glob("rewards-[0-9]*.jsonl")):
            try:
                for name, address, content, reward in _records(path):
                    if address.step >= self._step:
                        self._said.setdefault((name, address), {}).setdefault(content, reward)
            except (OSError, Unreadable) as error:
                log.warning("%s: not read (%s)", path, error)


def _records(path: Path) -> Iterator[tuple[str, Address, str, float]]:
    """What stands in a file; a line that is none, which a process was killed in writing, is passed over."""
    with open_plain(path) as file:
        while line := file.readline(LONGEST):
            try:
                record = json.loads(line)
                address = Address(str(record["scope"]), *(int(record[key]) for key in ("step", "sample", "member")))
                reward = float(record["reward"])
                found = str(record["name"]), address, str(record["hash"]), reward
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
            if math.isfinite(reward):
                yield found


def _ends_a_line(path: Path) -> bool:
    with open_plain(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"\n", b"")
