"""Which document goes to which lane, in which order: a pure function of (seed, epoch, lane).

A source that fits in memory is shuffled perfectly and cut into lanes of equal length; a larger one is streamed: its shards are
dealt to the lanes and shuffled in windows. (Parquet and hub files fewer than lanes are split by row groups: what the shards are
may then depend on the lanes.) The held-out documents are chosen by a hash of their text, so that training and validation never
overlap, whatever the seed or the shape, and equal documents stay on one side, also across the sources of a mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

from genscale.data.memory_source import HASHES, MemorySource, text_hash
from genscale.data.readers import Shard, Spec, find_shards, in_parts, known_size
from genscale.data.stream_source import StreamSource
from genscale.data.windows import Source
from genscale.errors import UserError

__all__ = ["HASHES", "MEMORY_LIMIT", "MemorySource", "Source", "StreamSource", "no_text", "open_source", "text_hash"]

MEMORY_LIMIT = 256 * 2**20
"""Bytes of text up to which a source is held in memory."""


def open_source(spec: Spec, *, fraction: float, window: int, seed: int, lanes: int, alone: bool = True,
                shards: list[Shard] | None = None) -> Source:
    """The training source of `spec` (of its `shards`, where they were looked for): in memory up to `MEMORY_LIMIT` bytes of
    text, else streamed.

    Of one that is not `alone` but in a mixture the held-out share may come to no document at all.

    Raises:
        UserError: nothing to read, nothing in it, or too little of it.
    """
    shards = find_shards(spec, at_least=1) if shards is None else shards
    size = known_size(shards)
    if size is not None and size <= MEMORY_LIMIT:
        texts = _load(shards)
        if texts is not None:
            if not texts:
                raise no_text(spec)
            return MemorySource(texts, fraction, spec, seed, lanes, alone)
    source = StreamSource(in_parts(shards, lanes), fraction, window, spec, seed, lanes)
    if next(source.documents(), None) is None:
        raise no_text(spec)
    return source


def no_text(spec: Spec) -> UserError:
    """The error for a source without a document."""
    what = "no conversation with an answer in column" if spec.pairs else "no text in column"
    kept = " that the filters keep" if spec.filters or spec.shortest or spec.longest is not None else ""
    columns = "', '".join(spec.content.values())
    return UserError(f"{spec.key}={spec.name}: holds {what} '{columns}'{kept}; give one with text, or python-docs")


def _load(shards: Sequence[Shard]) -> list[str] | None:
    """All documents in canonical order, or None where they exceed `MEMORY_LIMIT` (compressed files tell only when read)."""
    texts, size = [], 0
    for shard in shards:
        for _, text, _ in shard.rows():
            texts.append(text)
            size += len(text)
            if size > MEMORY_LIMIT:
                return None
    return texts
