"""The write-through token cache: a folder of tokenised pieces, keyed by where they stand in their source.

A key (shard, row, piece) does not depend on seed, epoch or block length, nor on lanes (unless parquet or hub files are fewer:
they are then read in row groups). One cache serves every run on the same text and tokenizer, and any number of processes read
and write it at once. Whatever is not there, or not yet, is tokenised on the fly: the cache decides about speed and never about
samples.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.packing import PIECE
from genscale.data.text.cache_shard import MARK, RECORD, Found, ShardIndex
from genscale.data.text.tokenizers import Tokenizer
from genscale.data.windows import Part
from genscale.errors import UserError
from genscale.reading import read_json

LOG = logging.getLogger(__name__)
LAYOUT = 1
MANIFEST = "manifest.json"
FLUSH_TOKENS = 2**18
FLUSH_SECONDS = 15.0
"""What a killed process has tokenised in vain, at most."""
REFRESH_SECONDS = 5.0
"""How often a reader that misses documents looks for what others have written meanwhile."""
MAPPED_SEGMENTS = 400
"""Segments in use at a time: each may hold a file descriptor, of which a process often has 1,024."""


@dataclass
class _Buffer:
    """What is not yet written of a shard."""

    tokens: list[np.ndarray] = field(default_factory=list)
    records: list[tuple[int, ...]] = field(default_factory=list)
    size: int = 0
    since: float = field(default_factory=time.monotonic)


class TokenCache:
    """Pieces of one source under one tokenizer.

    Args:
        folder: made where it is not there.
        tokenizer: whose ids are kept, as uint16 where they fit.
        identity: `Source.identity()`.
        key: the setting that names the folder, for messages.

    Raises:
        UserError: the folder holds something else, the cache of another tokenizer, source or layout, or cannot be written.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, identity: dict[str, Any], key: str = "data.cache") -> None:
        self.folder, self._key = folder.expanduser().absolute(), key
        self.token = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self._open({"what": "token cache of genscale", "layout": LAYOUT, "token_bytes": self.token.itemsize,
                    "piece_characters": PIECE, "tokenizer": tokenizer.digest, "source": identity})
        self._forget()

    def _forget(self) -> None:
        self._indexes: dict[int, ShardIndex] = {}
        self._buffers: dict[int, _Buffer] = {}
        self._written: dict[int, int] = {}
        self._writer, self._writes, self._reads = "", True, True
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_key": self._key, "token": self.token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()  # another process writes segments of its own

    def _open(self, manifest: dict[str, Any]) -> None:
        manifest = json.loads(json.dumps(manifest))
        path, advice = self.folder / MANIFEST, "remove it, or set another folder"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Listed before it is asked for the manifest: another process may put one there in between.
            holds = [entry.name for entry in os.scandir(self.folder) if not entry.name.startswith(f".{MANIFEST}")]
            if holds and not path.exists():
                raise UserError(f"{self._key}={self.folder}: the folder holds something else than a token cache; "
                                "set a folder that is empty or not there yet")
            if not path.exists():
                # All processes of a run come here at once: the manifest appears whole, and the first one stays.
                draft = self.folder / f".{MANIFEST}.{secrets.token_hex(4)}"
                draft.write_text(json.dumps(manifest, indent=1) + "\n")
                try:
                    os.link(draft, path)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.replace(draft, path)
                draft.unlink(missing_ok=True)
            found = read_json(path)
        except OSError as error:
            raise UserError(f"{self._key}={self.folder}: cannot be used ({error.strerror}); set a folder that can be "
                            "written, or leave the cache out") from None
        except ValueError:
            raise UserError(f"{self._key}={self.folder}: its {MANIFEST} is damaged; {advice}") from None
        if not isinstance(found, dict) or found.get("layout") != LAYOUT:
            layout = found.get("layout") if isinstance(found, dict) else None
            raise UserError(f"{self._key}={self.folder}: a token cache of layout {layout}, where this version reads layout "
                            f"{LAYOUT}; {advice}")
        if found["tokenizer"] != manifest["tokenizer"]:
            raise UserError(f"{self._key}={self.folder}: the cache of another tokenizer ({found['tokenizer'][:12]}, not "
                            f"{manifest['tokenizer'][:12]}); {advice}, or the tokenizer it was made with")
        theirs, ours = (side["source"] | {"piece_characters": side["piece_characters"]} for side in (found, manifest))
        changed = [f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in sorted(theirs.keys() | ours.keys())
                   if theirs.get(name) != ours.get(name)]
        if changed:
            lanes = " (parquet or hub files fewer than data.lanes are read in row groups: was data.lanes another?)"
            raise UserError(f"{self._key}={self.folder}: the cache of another source, or of the same otherwise read "
                            f"({'; '.join(changed)}){lanes if theirs.get('shards') != ours.get('shards') else ''}; {advice}")

    def make_room(self, expected: int, at_most: bool = False) -> None:
        """Refuse to begin where `expected` bytes more do not fit on the disk; warn where it may be (`at_most`) far fewer.

        Raises:
            UserError: names what is needed and what is free.
        """
        free = shutil.disk_usage(self.folder).free
        if expected > free and at_most:
            LOG.warning("%s=%s: it may take %.1f MB more, less what filters and limits of length leave out; %.1f MB are free "
                        "on its disk", self._key, self.folder, expected / 1e6, free / 1e6)
        elif expected > free:
            raise UserError(f"{self._key}={self.folder}: it will take about {expected / 1e6:,.1f} MB more, and "
                            f"{free / 1e6:,.1f} MB are free on its disk; make room, set a folder on another disk, or leave "
                            "the cache out")

    def _shard_folder(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06d}"

    def shard(self, shard: int, least: float = REFRESH_SECONDS) -> ShardIndex:
        """The index of a shard, not older than `least` seconds unless looking would cost too much."""
        index = self._indexes.pop(shard, None)
        fresh = index is None
        index = index or ShardIndex(self._shard_folder(shard), self.token)
        while self._indexes and len(index.names) + sum(len(other.names) for other in self._indexes.values()) > MAPPED_SEGMENTS:
            del self._indexes[next(iter(self._indexes))]  # the longest unused
        self._indexes[shard] = index
        try:
            if self._reads:
                index.refresh(0.0 if fresh else least)
        except OSError as error:
            self._stop_reading(error)
        return index

    def _stop_reading(self, error: OSError) -> None:
        self._reads = False
        LOG.warning("%s=%s cannot be read any more (%s): the run goes on without it", self._key, self.folder, error)

    def training_rows(self, part: Part) -> np.ndarray | None:
        """A `Catalogue`: the part's training rows where all of them are cached."""
        self.flush(part.shard)
        try:
            return self.shard(part.shard, least=0.0).training_rows(part) if self._reads else None
        except OSError as error:
            self._stop_reading(error)
            return None

    def find(self, shards: np.ndarray, rows: np.ndarray) -> list[tuple[np.ndarray, Found]]:
        """Per shard: which of the documents asked for are in it, and what is known of those."""
        found = []
        try:
            for shard in np.unique(shards).tolist() if self._reads else ():
                documents = np.flatnonzero(shards == shard)
                result = self.shard(shard, least=float("inf")).find(rows[documents])
                if not result.complete.all():
                    result = self.shard(shard).find(rows[documents])
                found.append((documents, result))
        except OSError as error:
            self._stop_reading(error)
        return found

    def missing(self, sizes: list[int]) -> int:
        """Bytes of text that are not cached, about, of shards of those sizes."""
        missing = 0
        for shard, size in enumerate(sizes):
            index = ShardIndex(self._shard_folder(shard), self.token)
            if not index.ended():
                missing += max(0, size - index.text_bytes())
        return missing

    def append(self, shard: int, row: int, piece: int, last: bool, ids: np.ndarray, size: int) -> None:
        """Keep a piece of `size` bytes of text; it reaches the disk within `FLUSH_TOKENS` and `FLUSH_SECONDS` of reading on."""
        if not self._writes:
            return
        with self._lock:
            buffer = self._buffers.setdefault(shard, _Buffer())
            start = self._written.get(shard, 0) + buffer.size
            buffer.records.append((row, start, piece, len(ids), size, MARK + last))
            buffer.tokens.append(ids.astype(self.token))
            buffer.size += len(ids)
            if buffer.size >= FLUSH_TOKENS or time.monotonic() - buffer.since > FLUSH_SECONDS:
                self.flush(shard)

    def finish(self, part: Part, documents: int) -> None:
        """Note that all `documents` training documents of a part are cached, if they are."""
        self.flush(part.shard)
        if not (self._writes and self._reads) or self.training_rows(part) is not None:
            return
        index = ShardIndex(self._shard_folder(part.shard), self.token)  # whatever the other one has seen so far
        index.refresh(0.0)
        end = index.end(part)
        if end["documents"] == documents:
            line = json.dumps({"residue": part.residue, "modulus": part.modulus, **end}) + "\n"
            self._guarded(part.shard, lambda path: _append(path.with_suffix(".ends"), line.encode()))

    def flush(self, shard: int | None = None) -> None:
        """Write what is kept back. A full disk ends the writing, with a warning, and not the run."""
        with self._lock:
            for number in [shard] if shard is not None else list(self._buffers):
                buffer = self._buffers.pop(number, None)
                if buffer is None or not self._writes:
                    continue
                self._guarded(number, lambda path, buffer=buffer: self._write(path, buffer))
                self._written[number] = self._written.get(number, 0) + buffer.size

    def _write(self, path: Path, buffer: _Buffer) -> None:
        _append(path.with_suffix(".tokens"), np.concatenate(buffer.tokens).tobytes())
        _append(path.with_suffix(".index"), np.array(buffer.records, RECORD).tobytes())

    def _guarded(self, shard: int, write: Any) -> None:
        try:
            self._writer = self._writer or f"{socket.gethostname().split('.')[0]}-{os.getpid()}-{secrets.token_hex(4)}"
            folder = self._shard_folder(shard)
            if not folder.is_dir():  # not `parents=True`: a cache that someone removed does not come back in part
                folder.parent.mkdir(exist_ok=True)
                folder.mkdir(exist_ok=True)
            write(folder / self._writer)
        except OSError as error:
            self._writes = False
            self._buffers = {}
            LOG.warning("%s=%s cannot be written any more (%s): the run goes on without writing to it", self._key, self.folder,
                        error.strerror or error)

    @property
    def writes(self) -> bool:
        """Whether pieces are still kept: false after the disk was full."""
        return self._writes

    def totals(self, shards: int) -> dict[str, int]:
        """Complete documents, their tokens and bytes of text, and the bytes that the cache takes on the disk."""
        totals = {"documents": 0, "tokens": 0, "bytes": 0}
        for shard in range(shards):
            index = self.shard(shard, least=0.0)
            totals["documents"] += len(index.rows())
            totals["tokens"] += index.totals["tokens"]
            totals["bytes"] += index.totals["bytes"]
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {**totals, "size": sum(path.stat().st_size for path in files)}

    def close(self) -> None:
        """Write what is kept back, and let go of files."""
        self.flush()
        self._indexes = {}


def _append(path: Path, content: bytes) -> None:
    """To the end of the file, and to the disk. (Whatever points at it is written only afterwards.)"""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
