"""A source of any size: its shards are dealt to the lanes, their documents shuffled in windows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from genscale.data.memory_source import HASHES, text_hash
from genscale.data.packing import Place
from genscale.data.row_source import SourceShard
from genscale.data.shard import Shard
from genscale.data.source_file import is_url
from genscale.data.spec import Spec
from genscale.data.windows import Catalogue, Part, Source, Window
from genscale.errors import UserError
from genscale.rng import permutation

PROBED = 256
"""Files of a source that are told apart by their bytes when a run goes on."""
ASKED = 8
"""Shards of an installed source whose first row is read for the same."""
PROBE = 4096
"""Bytes of a file's beginning, middle and end that tell it from another of the same name and size."""
COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")
COMPRESSION = 3
"""Bytes of text in a byte of such a file, about."""
Document = tuple[int, int, int, str | None, list[int] | None]
"""(number of the part in the lane's share, shard, row, text unless the catalogue knew the row, where the shard's reading begins
to reach it)."""


class StreamSource(Source):
    """Shards dealt to lanes by a permutation keyed (seed, epoch), their documents shuffled in windows.

    A window's permutation is keyed (seed, epoch, lane, window): there is nothing to save but where the window starts.

    Args:
        shards: what to read.
        fraction: share of the documents to hold out.
        window: documents shuffled together.
        spec, seed, lanes: the source's name for messages, the key of the order, the number of lanes.

    Attributes:
        unit, advice: what a shard is made of, and what to do where a lane gets none of it, for messages.
    """

    unit, advice = "document", "fewer data.lanes, or a smaller data.document"

    def __init__(self, shards: Sequence[Shard], fraction: float, window: int, spec: Spec, seed: int, lanes: int) -> None:
        self._shards, self._window, self._spec, self._seed, self._lanes = list(shards), window, spec, seed, lanes
        self._fraction, self._threshold = fraction, int(fraction * HASHES)
        self.sizes_are_most = bool(spec.filters or spec.shortest or spec.longest is not None)

    def _trains(self, text: Any) -> bool:
        return not self._threshold or text_hash(text) >= self._threshold

    def share(self, lane: int, epoch: int) -> list[Part]:
        """What the lane reads in the epoch.

        Whole shards as far as they go round; the rest is cut into as many residues of rows as give every lane the same number.
        """
        count, lanes = len(self._shards), self._lanes
        order = permutation(count, self._seed, "shards", epoch).tolist()
        whole = count - count % lanes
        rest = order[whole:]
        cuts = lanes // math.gcd(len(rest), lanes)
        residues = [Part(shard, residue, cuts) for residue in range(cuts) for shard in rest]
        return [Part(shard, 0, 1) for shard in order[lane:whole:lanes]] + residues[lane::lanes]

    def _rows(self, share: Sequence[Part], catalogue: Catalogue | None, finished: list[tuple[Part, int]], first: int = 0,
              row: int = 0, begin: list[int] | None = None) -> Iterator[Document]:
        """The training documents of a share from a row of its part `first` on (`begin`: see `Shard.rows`). Parts that were read
        (not looked up) from front to back come into `finished`."""
        for number, part in enumerate(share[first:], first):
            known = catalogue(part) if catalogue else None
            if known is not None:
                yield from ((number, part.shard, at, None, None) for at in known[known >= row].tolist())
            else:
                count = 0
                for found, text, at in self._shards[part.shard].rows(row, part.residue, part.modulus, begin):
                    if self._trains(text):
                        yield number, part.shard, found, text, at
                        count += 1
                if row == 0:
                    finished.append((part, count))
            row, begin = 0, None

    def windows(self, lane: int, place: Place | None = None, catalogue: Catalogue | None = None) -> Iterator[Window]:
        place = place or {"epoch": 0, "part": 0, "row": 0, "window": 0, "document": 0, "piece": 0}
        empty = 0
        while True:
            epoch, number, start = place["epoch"], place["window"], (place["document"], place["piece"])
            finished: list[tuple[Part, int]] = []
            rows = self._rows(self.share(lane, epoch), catalogue, finished, place["part"], place["row"], place.get("at"))
            while documents := list(islice(rows, self._window)):
                empty = 0
                order = permutation(len(documents), self._seed, "window", epoch, lane, number)
                at = {"epoch": epoch, "part": documents[0][0], "row": documents[0][2], "at": documents[0][4], "window": number}
                yield self._documents([documents[i] for i in order], at, start, finished)
                number, start = number + 1, (0, 0)
            if finished:
                yield self._documents([], {}, (0, 0), finished)
            empty += number == 0
            if empty == 2:  # the shares of one epoch may miss a lane by chance
                raise UserError(f"data.lanes={self._lanes}: lane {lane} of {self._spec.key}={self._spec.name} gets no "
                                f"{self.unit}; set {self.advice}")
            place = {"epoch": epoch + 1, "part": 0, "row": 0, "window": 0, "document": 0, "piece": 0}

    def _documents(self, documents: list[Document], at: Place, start: tuple[int, int],
                   finished: list[tuple[Part, int]]) -> Window:
        lost: dict[int, dict[int, str]] = {}

        def text(n: int) -> str:
            _, shard, row, held, _ = documents[n]
            if held is not None:
                return held
            if shard not in lost:  # rows that the catalogue knew are read only where tokens of them are gone from the cache
                known = sorted(at for _, other, at, held, _ in documents if other == shard and held is None)
                lost[shard] = self._texts(shard, known)
            return lost[shard][row]

        ended = finished.copy()
        finished.clear()
        shards, rows = (np.array([document[i] for document in documents], np.int64) for i in (1, 2))
        return Window(shards, rows, text, lambda n, piece: {**at, "document": n, "piece": piece}, start, finished=ended)

    def _texts(self, shard: int, rows: Sequence[int]) -> dict[int, str]:
        """The texts of increasing rows of a shard, in one pass: without its place a row of a file of lines is found only by
        reading what comes before."""
        step = int(np.gcd.reduce(np.diff(rows))) if len(rows) > 1 else 1
        wanted, found = set(rows), {}
        for row, text, _ in self._shards[shard].rows(rows[0], rows[0] % step, step):
            if row in wanted:
                found[row] = text
            if row >= rows[-1]:
                break
        return found

    def parts(self, processes: int) -> list[tuple[Part, int]]:
        cuts = -(-processes // len(self._shards))
        return [(Part(number, residue, cuts), shard.size // cuts)
                for number, shard in enumerate(self._shards) for residue in range(cuts)]

    def sizes(self) -> list[int]:
        compressed = [shard.name.partition("#")[0].endswith(COMPRESSED) for shard in self._shards]
        return [shard.size * (COMPRESSION if small else 1) for shard, small in zip(self._shards, compressed, strict=True)]

    def sweep(self, part: Part, catalogue: Catalogue | None = None) -> Iterator[Window]:
        finished: list[tuple[Part, int]] = []
        rows = self._rows([part], catalogue, finished)
        while documents := list(islice(rows, self._window)):
            yield self._documents(documents, {}, (0, 0), finished)
        yield self._documents([], {}, (0, 0), finished)

    def _all(self) -> Iterator[str]:
        return (text for shard in self._shards for _, text, _ in shard.rows())

    def documents(self) -> Iterator[str]:
        return (text for text in self._all() if self._trains(text))

    def held_out(self) -> Iterator[str]:
        return (text for text in self._all() if not self._trains(text))

    def plan(self) -> dict[str, Any]:
        names = hashlib.sha256(repr([(shard.name, shard.size) for shard in self._shards]).encode()).hexdigest()
        return {"order": "stream", "shards": len(self._shards), "bytes": sum(shard.size for shard in self._shards),
                "content": names, "window": self._window, **self._probes, **versions(self._shards), **self._fingerprints}

    @cached_property
    def _probes(self) -> dict[str, str]:
        """What tells local files from others of the same names and sizes: of many files, of some."""
        return {"probes": probes(self._shards[:: -(-len(self._shards) // PROBED)])} if any(map(_path, self._shards)) else {}

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        """What tells the rows of an installed source from others in shards of the same names."""
        some = self._shards[:: -(-len(self._shards) // ASKED)]
        found = [shard.fingerprint for shard in some if isinstance(shard, SourceShard)]
        return {"fingerprint": hashlib.sha256(repr(found).encode()).hexdigest()} if found else {}

    def files(self) -> list[tuple[str, str]]:
        return list({path: (shard.name.partition("#")[0], path) for shard in self._shards if (path := _path(shard))}.values())

    def identity(self) -> dict[str, Any]:
        plan = {key: value for key, value in self.plan().items() if key not in ("window", "probes", "versions")}
        # Where the data lies is not what it is: a folder may move.
        spec = {key: value for key, value in dataclasses.asdict(self._spec).items()
                if key not in ("key", "name", "revision", "locations", "retry_minutes", "max_record_bytes", "answer_roles",
                               "tools", "bad_share", "left_out") and (key, value) != ("options", None)}
        return {**plan, "files": probes(self._shards), **json.loads(json.dumps(spec, default=str)),
                "validation_fraction": self._fraction}


def versions(shards: Sequence[Shard]) -> dict[str, str]:
    """A digest of what web servers call the versions of the shards; empty where no server does."""
    found = [(shard.name, file.version) for shard in shards
             if (file := getattr(shard, "file", None)) and is_url(file.path) and file.version]
    return {"versions": hashlib.sha256(repr(found).encode()).hexdigest()} if found else {}


def probes(shards: Sequence[Shard]) -> str:
    """A digest of a few bytes of each local file: a plan knows names and sizes, and a file may have been replaced by one of the
    same size."""
    return hashlib.sha256(repr([_probe(_path(shard)) for shard in shards]).encode()).hexdigest()


def _path(shard: Shard) -> str:
    """The path of the local file that the shard is read from; nothing where there is none."""
    path = file.path if (file := getattr(shard, "file", None)) else ""
    return path if path and Path(path).is_file() else ""


def _probe(path: str) -> str:
    if not path:
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        for at in (0, size // 2, max(0, size - PROBE)):
            file.seek(at)
            digest.update(file.read(PROBE))
    return digest.hexdigest()
