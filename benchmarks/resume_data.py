"""Time and bytes to take up a large source again near its beginning and near its end.

    python benchmarks/resume_data.py --out benchmarks/results/resume-data-cpu.json

One file of each kind (`--megabytes`, 500) is written to `--folder` and read once through its lane, to take the places at 1 %
and at 99 % of it. A resume is then timed, with the file in the page cache: opening the lane at that place and reading one
window of 256 documents. The bytes are those of this process's read calls (`rchar` of /proc/self/io). `--beside FILE` keeps an
earlier result next to this one; the script runs on earlier commits too.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
from genscale.data.columns import Spec
from genscale.data.images import sources as image_sources
from genscale.data.images.shards import ImageSpec
from genscale.data.text import sources
from genscale.data.windows import Source

import pyarrow as pa
import pyarrow.parquet as pq

SHARES = (0.01, 0.99)
TRIES = 3


def texts(megabytes: int) -> Iterator[str]:
    """Documents of 2 kB or so that do not compress well."""
    draw = random.Random(0)
    for number in range(megabytes * 500):
        yield f"{number} {draw.randbytes(draw.randint(500, 1450)).hex()}"


def write_jsonl(path: Path, megabytes: int) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(megabytes))


def write_parquet(path: Path, megabytes: int) -> None:
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="none", use_dictionary=False) as writer:
        rows: list[str] = []
        for text in texts(megabytes):
            rows.append(text)
            if len(rows) == 1000:
                writer.write_table(pa.table({"text": rows}))
                rows = []
        writer.write_table(pa.table({"text": pa.array(rows, pa.string())}))


def write_tar(path: Path, megabytes: int) -> None:
    draw = random.Random(0)
    with tarfile.open(path, "w") as archive:
        for number in range(megabytes * 50):
            member = tarfile.TarInfo(f"{number:07}.png")
            member.size = 20_000
            archive.addfile(member, io.BytesIO(draw.randbytes(20_000)))


def open_text(path: Path) -> Source:
    """The file as a stream of one lane."""
    return sources.open_source(Spec("data.source", str(path)), fraction=0.0, window=256, seed=1, lanes=1)


def open_tar(path: Path) -> Source:
    """The same of a tar."""
    spec = ImageSpec("data.source", str(path))
    return image_sources._stream(image_sources.find_shards(spec)[0], spec, image_sources.Order(0.0, 256, 1, 1))


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def measure(source: Source) -> dict[str, Any]:
    """Seconds and megabytes of a resume at each share of the epoch."""
    started = time.perf_counter()
    places = []
    for window in source.windows(0):
        if window.place(0, 0)["epoch"]:
            break
        places.append(window.place(0, 0))
    found: dict[str, Any] = {"windows": len(places), "epoch_seconds": round(time.perf_counter() - started, 2)}
    for share in SHARES:
        place = json.loads(json.dumps(places[int(share * len(places))]))
        seconds, amounts = [], []
        for _ in range(TRIES):
            before, started = bytes_read(), time.perf_counter()
            next(source.windows(0, place)).text(0)
            seconds.append(time.perf_counter() - started)
            amounts.append(bytes_read() - before)
        found[f"at_{share:.0%}"] = {"seconds": round(sorted(seconds)[TRIES // 2], 4),
                                    "megabytes_read": round(max(amounts) / 1e6, 2), "cursor_bytes": len(json.dumps(place))}
    return found


KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], Source]]] = {
    "jsonl": (write_jsonl, open_text), "parquet": (write_parquet, open_text), "tar": (write_tar, open_tar)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where the files are written, and found again")
    parser.add_argument("--beside", type=Path, help="an earlier result to keep next to this one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sources.MEMORY_LIMIT = image_sources.MEMORY_LIMIT = 2**20
    result = {**report.circumstances(["datasets", "pyarrow"]), "megabytes": arguments.megabytes}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, (write, opened) in KINDS.items():
            path = (arguments.folder or Path(scratch)) / f"large.{kind}"
            if not path.exists():
                write(path, arguments.megabytes)
            result[kind] = {"file_megabytes": round(path.stat().st_size / 1e6, 1), **measure(opened(path))}
    if arguments.beside:
        result["before"] = json.loads(arguments.beside.read_text())
    report.write(result, arguments.out)


if __name__ == "__main__":
    main()
