"""Which document goes to which lane, in which order: a pure function of (seed, epoch, lane).

A source that fits in memory is shuffled perfectly and cut into lanes of equal length; a larger one is streamed: its shards are
dealt to the lanes and shuffled in windows. (Parquet and hub files fewer than lanes are split by row groups: what the shards are
may then depend on the lanes.) The held-out documents are chosen by a hash of their text, so that training and validation never
overlap, whatever the seed or the shape, and equal documents stay on one side, also across the sources of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genscale.data.memory_source import HASHES, MemorySource, text_hash
from genscale.data.readers import Shard, Spec, find_shards, in_parts, known_size
from genscale.data.stream_source import StreamSource
from genscale.data.windows import Source
from genscale.errors import UserError

__all__ = ["HASHES", "MEMORY_LIMIT", "MemorySource", "Source", "StreamSource", "no_text", "open_source", "text_hash"]

MEMORY_LIMIT = 256 * 2**20
"""Bytes of text up to which a source is held in memory."""
LOOKED_AT = 64 * 2**20
"""Of a source in memory so many bytes of conversations are looked at before the first step: a template takes its time."""


def open_source(spec: Spec, *, fraction: float, window: int, seed: int, lanes: int, alone: bool = True,
                shards: list[Shard] | None = None, refuse: Callable[[str], bool] = lambda _: False) -> Source:
    """The training source of `spec` (of its `shards`, where they were looked for): in memory up to `MEMORY_LIMIT` bytes of
    text, else streamed.

    Of one that is not `alone` but in a mixture the held-out share may come to no document at all.

    Args:
        refuse: whether a document is left out; asked of those at the beginning of a source that is held in memory. Of others
            it is not asked: what encodes the documents leaves them out.

    Raises:
        UserError: nothing to read, nothing in it, or too little of it.
    """
    shards = find_shards(spec, at_least=1) if shards is None else shards
    size = known_size(shards)
    if size is not None and size <= MEMORY_LIMIT:
        texts = _load(spec, shards, refuse)
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
    if spec.pairs and spec.left_out.first:
        return spec.left_out.first
    what = "no prompt in column" if spec.beside is not None else \
        "no conversation with an answer in column" if spec.pairs else "no text in column"
    kept = " that the filters keep" if spec.filters or spec.shortest or spec.longest is not None else ""
    columns = "', '".join(spec.content.values())
    why = spec.left_out.no_answer() or "; give one with text, python-stdlib or python-docs"
    return UserError(f"{spec.key}={spec.name}: holds {what} '{columns}'{kept}{why}")


def _load(spec: Spec, shards: Sequence[Shard], refuse: Callable[[str], bool]) -> list[str] | None:
    """All documents in canonical order but those to leave out, or None where they exceed `MEMORY_LIMIT` (compressed files tell
    only when read)."""
    texts, size = [], 0
    with spec.left_out.of_the_whole():
        for shard in shards:
            for _, text, _ in shard.rows():
                size += len(text)
                if size > MEMORY_LIMIT:
                    return None
                if size > LOOKED_AT or not refuse(text):
                    texts.append(text)
    return texts
