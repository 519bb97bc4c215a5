"""From a source's documents to token ids: from the cache where they are there, through the tokenizer (and into it) where not.

Both ways give the same ids under the same places: a run with a cache sees the samples of a run without.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.packing import PIECE, Place, Run, pack_runs
from genscale.data.text.cache import TokenCache
from genscale.data.text.cache_files import check_files
from genscale.data.text.cache_shard import Buffer, Found
from genscale.data.text.tokenizers import Tokenizer, encode_pieces
from genscale.data.windows import Source, Stretch, Window

CHUNK = 4096
"""Documents looked up at a time."""
RUN_TOKENS = 2**16
"""Cached tokens gathered at a time: few enough to stay in a core's cache, many enough that the calls do not count."""
SAMPLE = 2**16
"""Bytes of text from which the size of a cache is estimated."""


def _place(window: Window, documents: list[int], numbers: list[int], n: int) -> Place:
    return window.place(documents[n], numbers[n])


class EncodedSource:
    """Lanes of token ids. Picklable: worker processes read lanes too, and write to the cache beside each other.

    Attributes:
        tokenised: tokens that went through the tokenizer in this process; 0 where everything came from the cache.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, cache: TokenCache | None) -> None:
        self.source, self.tokenizer, self.cache = source, tokenizer, cache
        self._catalogue = cache.training_rows if cache else None
        self.tokenised = 0

    @property
    def own_cache(self) -> TokenCache:
        """The cache of a source that has one."""
        assert self.cache is not None
        return self.cache

    def blocks(self, lane: int, place: Place | None, length: int, offset: int = 0) -> Iterator[tuple[np.ndarray, Place, int]]:
        """Endless blocks of a lane, from the start or from the place and offset that came with a block: see `pack`."""
        return pack_runs(self.read(lane, place), length, offset)

    def read(self, lane: int, place: Place | None = None) -> Iterator[Run]:
        """Endless ids of a lane's pieces, epoch after epoch; from the start, or from the place of a piece."""
        for window in self.source.windows(lane, place, self._catalogue):
            yield from self.encode(window)

    def encode(self, window: Window) -> Iterator[Run]:
        """The ids of a window's pieces."""
        batch = _Batch(self, window)
        for first in range(window.start[0], len(window.rows), CHUNK):
            known = _Known(self.cache, window, first)
            for low, high, cached in known.spans():
                if cached:
                    yield from batch.flush()
                    yield from self._gathered(window, known, low, high)
                    continue
                for document in range(low, high):
                    there = known.pieces(document)
                    for stretch in window.stretches(document):
                        if stretch.whole and stretch.number in there:
                            yield from batch.flush()
                            yield self._one(window, document, stretch.number, known.ids(there[stretch.number]))
                        else:
                            yield from batch.add(document, stretch)
        yield from batch.flush()
        for part, documents in window.finished:
            if self.cache:
                self.cache.finish(part, documents)

    def _gathered(self, window: Window, known: _Known, low: int, high: int) -> Iterator[Run]:
        pieces = known.between(low, high, window.start)
        ends = np.cumsum(known.lengths(pieces))
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.unique(np.r_[0, np.searchsorted(ends, np.arange(RUN_TOKENS, total, RUN_TOKENS)) + 1, len(ends)])
        for a, b in pairwise(cuts.tolist()):
            own = pieces[a:b]
            documents, numbers = known.documents[own].tolist(), known.numbers[own].tolist()
            yield Run(known.gather(own), ends[a:b] - (ends[a - 1] if a else 0),
                      partial(_place, window, documents, numbers))

    def _one(self, window: Window, document: int, number: int, ids: np.ndarray) -> Run:
        return Run(ids, np.array([len(ids)]), lambda _: window.place(document, number))

    def close(self) -> None:
        """Write out what the cache keeps back."""
        if self.cache:
            self.cache.close()


class _Batch:
    """Pieces gathered for the tokenizer, which is faster on many at a time."""

    def __init__(self, encoded: EncodedSource, window: Window) -> None:
        self._encoded, self._window = encoded, window
        self._items: list[tuple[int, Stretch]] = []
        self._size = 0

    def add(self, document: int, stretch: Stretch) -> Iterator[Run]:
        self._items.append((document, stretch))
        self._size += len(stretch.text)
        if self._size >= PIECE:
            yield from self.flush()

    def flush(self) -> Iterator[Run]:
        if not self._items:
            return
        items, self._items, self._size = self._items, [], 0
        ids = encode_pieces(self._encoded.tokenizer, [(item.text, item.begins, item.ends) for _, item in items])
        cache, window = self._encoded.cache, self._window
        if cache and cache.writes:
            for (document, item), own in zip(items, ids, strict=True):
                if item.whole:
                    cache.append(int(window.shards[document]), int(window.rows[document]), item.number, item.ends, own,
                                 len(item.text.encode()))
        ends = np.cumsum([len(own) for own in ids])
        self._encoded.tokenised += int(ends[-1])
        yield Run(np.concatenate(ids), ends, lambda n: window.place(items[n][0], items[n][1].number))


class _Known:
    """What the cache has of the documents [first, first + CHUNK) of a window, as flat arrays over their pieces."""

    def __init__(self, cache: TokenCache | None, window: Window, first: int) -> None:
        stop = min(first + CHUNK, len(window.rows))
        found = cache.find(window.shards[first:stop], window.rows[first:stop]) if cache else []
        self._complete = np.zeros(stop - first, bool)
        self._first, self._token = first, cache.token if cache else np.dtype(np.int32)
        for documents, result in found:
            self._complete[documents] = result.complete
        if len(found) == 1 and len(found[0][0]) == stop - first:
            self._take(found[0][1], found[0][1].document + first)
        else:
            self._merge(found, first)
        for document in window.limits:
            if first <= document < stop:
                self._complete[document - first] = False

    def _take(self, found: Found, documents: np.ndarray) -> None:
        self.documents, self.numbers, self._files = documents, found.number, found.files
        self._low, self._high, self._file = found.low, found.high, found.file

    def _merge(self, found: list[tuple[np.ndarray, Found]], first: int) -> None:
        """A window may mix shards."""
        empty = np.empty(0, np.int64)
        files: list[Buffer] = []
        columns: list[list[np.ndarray]] = [[empty], [empty], [empty], [empty], [empty]]
        for documents, result in found:
            own = (documents[result.document] + first, result.number, result.low, result.high, result.file + len(files))
            for column, values in zip(columns, own, strict=True):
                column.append(values)
            files += result.files
        documents, *rest = (np.concatenate(column) for column in columns)
        order = np.argsort(documents, kind="stable")
        number, low, high, file = (column[order] for column in rest)
        self._take(Found(documents[order], number, low, high, file, files, self._complete), documents[order])

    def spans(self) -> list[tuple[int, int, bool]]:
        """(first document, stop, whether they are all cached), in order."""
        edges = np.flatnonzero(np.diff(self._complete)) + 1
        cuts = [0, *edges.tolist(), len(self._complete)]
        return [(self._first + a, self._first + b, bool(self._complete[a])) for a, b in pairwise(cuts) if a < b]

    def between(self, low: int, high: int, start: tuple[int, int]) -> np.ndarray:
        """The pieces of documents [low, high), without those before `start`."""
        a, b = np.searchsorted(self.documents, [low, high])
        if low == start[0]:
            a += int(np.searchsorted(self.numbers[a : np.searchsorted(self.documents, low, side="right")], start[1]))
        return np.arange(a, b)

    def pieces(self, document: int) -> dict[int, int]:
        """Number of a piece of the document -> where it stands in the arrays."""
        if not len(self.documents):
            return {}
        a, b = np.searchsorted(self.documents, [document, document + 1]).tolist()
        return {int(self.numbers[at]): at for at in range(a, b)}

    def ids(self, at: int) -> np.ndarray:
        return self.gather(np.array([at]))

    def lengths(self, pieces: np.ndarray) -> np.ndarray:
        """Tokens of pieces."""
        return (self._high[pieces] - self._low[pieces]) // self._token.itemsize

    def gather(self, pieces: np.ndarray) -> np.ndarray:
        """Ids of pieces, end to end, int32."""
        # All in C: a corpus of short documents has several pieces a block.
        parts = map(slice, self._low[pieces].tolist(), self._high[pieces].tolist())
        if len(self._files) == 1:
            raw = b"".join(map(self._files[0].__getitem__, parts))
        else:
            raw = b"".join(map(getitem, map(self._files.__getitem__, self._file[pieces].tolist()), parts))
        return np.frombuffer(raw, self._token).astype(np.int32)


def open_encoded(source: Source, tokenizer: Tokenizer, cache: Path | None, key: str = "data.cache") -> EncodedSource:
    """The source in token ids, through the cache in the folder `cache` if there is one.

    Raises:
        UserError: the folder is no cache of this source and tokenizer, cannot be written, or its disk has no room.
    """
    if cache is None:
        return EncodedSource(source, tokenizer, None)
    opened = TokenCache(cache, tokenizer, source.identity(), key)
    check_files(opened.folder, source.files(), key)
    opened.make_room(_expected_bytes(source, tokenizer, opened), at_most=source.sizes_are_most)
    return EncodedSource(source, tokenizer, opened)


def _expected_bytes(source: Source, tokenizer: Tokenizer, cache: TokenCache) -> int:
    """Bytes that the cache has still to grow by, about, from the size of the text that is not in it."""
    missing = cache.missing(source.sizes())
    if not missing:
        return 0
    text = "".join(document[:SAMPLE] for document in islice(source.documents(), 16))[:SAMPLE]
    tokens_a_byte = len(tokenizer.encode(text)) / max(1, len(text.encode()))
    return int(1.1 * missing * tokens_a_byte * cache.token.itemsize)


def describe(encoded: EncodedSource) -> dict[str, Any]:
    """Totals of the cache: documents, tokens, bytes of text, size on the disk."""
    return encoded.own_cache.totals(len(encoded.source.sizes()))
