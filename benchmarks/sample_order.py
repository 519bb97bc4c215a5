"""The order of the samples, for any number of processes and loader workers and any micro-batch: one digest for each source.

    python benchmarks/sample_order.py --out benchmarks/results/sample-order-cpu.json

Every rank's StepLoader is read in this process; what they give is put together to global batches, whose sample numbers and
contents are hashed in order. Files are read as those are that do not fit in memory.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import io
import itertools
import json
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genscale.data.images import sources as image_sources
from genscale.data.lanes import Data
from genscale.data.loader import StepLoader
from genscale.data.order import merge_states
from genscale.data.text import sources
from genscale.families import FAMILIES, family
from genscale.settings.config import Config
from genscale.settings.parser import parse_config
from report import circumstances, write

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

GLOBAL_BATCH = 24
WORLD_SIZES, WORKERS = (1, 2, 3, 4, 8), (0, 1, 2, 4)
DOCUMENTS, IMAGES, SHARDS = 400, 120, 4


class Handler(http.server.SimpleHTTPRequestHandler):
    """A static host that answers range requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        content, status, headers = Path(self.translate_path(self.path)).read_bytes(), 200, {"Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            stop = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            content, status = content[int(first):stop], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def write_sources(folder: Path) -> None:
    """Documents of some hundred bytes as .jsonl and .parquet, pictures as .tar and as a folder; in shards, all different."""
    draw = np.random.default_rng(0)
    texts = [f"document {i}: " + " ".join(map(str, draw.integers(0, 10**6, 30))) for i in range(DOCUMENTS)]
    pixels = draw.integers(0, 256, (IMAGES, 16, 16), np.uint8)
    for part in ("jsonl", "parquet", "tar", "folder"):
        (folder / part).mkdir()
    for shard in range(SHARDS):
        part = texts[shard::SHARDS]
        (folder / "jsonl" / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        pq.write_table(pa.table({"text": part}), folder / "parquet" / f"{shard}.parquet", row_group_size=20)
        with tarfile.open(folder / "tar" / f"{shard}.tar", "w") as tar:
            for number in range(shard, IMAGES, SHARDS):
                buffer = io.BytesIO()
                Image.fromarray(pixels[number]).save(buffer, "png")
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "folder" / f"{number:04d}.png")


def settings_of(folder: Path, url: str) -> dict[str, dict[str, Any]]:
    """Flags of `genscale train` for each source."""
    text = {"data.sequence_length": 32, "data.lanes": 12, "data.shuffle_window": 16}
    images = {"model.family": "vae", "data.size": 16, "data.channels": 1, "data.lanes": 12, "data.validation_images": 4}
    mixture = [{"source": str(folder / "jsonl"), "weight": 0.7},
               {"source": [f"{url}/parquet/{i}.parquet" for i in range(SHARDS)], "weight": 0.3}]
    return {"jsonl": {**text, "data.source": folder / "jsonl"},
            "parquet over HTTP": {**text, "data.source": json.dumps([f"{url}/parquet/{i}.parquet" for i in range(SHARDS)])},
            "tar": {**images, "data.source": folder / "tar", "data.window": 16},
            "folder": {**images, "data.source": folder / "folder"},
            "mixture": {**text, "data.sources": json.dumps(mixture)}}


def opened(settings: dict[str, Any]) -> Data:
    config: Config = parse_config(FAMILIES, [word for key, value in settings.items() for word in (f"--{key}", str(value))])
    return family(config.model.family).build_data(config.data, config.run.seed)


def order(data: Data, shapes: list[tuple[int, int, int]], steps: int) -> str:
    """SHA-256 over numbers and contents of the samples of `steps` global batches.

    Args:
        shapes: (processes, workers, micro-batch); with several, each takes an equal part of the steps, resuming the one before.
    """
    total, state = hashlib.sha256(), None
    for index, (world_size, workers, micro) in enumerate(shapes):
        loaders = [StepLoader(data, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro, rank=rank, world_size=world_size,
                              workers=workers, prefetch_steps=2, state=state) for rank in range(world_size)]
        try:
            for _ in range(steps * index // len(shapes), steps * (index + 1) // len(shapes)):
                for content in _global_batch(loaders):
                    total.update(content)
            state = merge_states([loader.state() for loader in loaders], data.lane_count)
        finally:
            for loader in loaders:
                loader.close()
    return total.hexdigest()


def _global_batch(loaders: list[StepLoader]) -> list[bytes]:
    """Each sample of the next global batch (its number and arrays), in the order of the numbers."""
    samples: dict[int, bytes] = {}
    for micro_batch in itertools.chain.from_iterable(loader.next_batch() for loader in loaders):
        numbers = micro_batch.pop("sample").tolist()
        for at, number in enumerate(numbers):
            assert number not in samples, f"sample {number} came twice"
            samples[number] = str(number).encode() + b"".join(_bytes(micro_batch[name][at]) for name in sorted(micro_batch))
    assert len(samples) == GLOBAL_BATCH and max(samples) - min(samples) == GLOBAL_BATCH - 1, sorted(samples)
    return [samples[number] for number in sorted(samples)]


def _bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().numpy().tobytes()


def shapes_of(world_sizes: tuple[int, ...], workers: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(processes, workers, micro-batch): the whole of a rank's share, a third of it, and one sample; where workers load, which
    know nothing of micro-batches, one of these in turn."""
    shapes = []
    for turn, size in enumerate(world_sizes):
        share = GLOBAL_BATCH // size
        shapes += [(size, 0, micro) for micro in (share, share // 3, 1)]
        shapes += [(size, worker, (share, share // 3, 1)[(turn + at) % 3]) for at, worker in enumerate(workers) if worker]
    return list(dict.fromkeys(shapes))


def measure(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """One source under every shape, and under another shape every few steps."""
    data, began = opened(settings), time.perf_counter()
    try:
        shapes = shapes_of(WORLD_SIZES, WORKERS)
        truth = order(data, [(1, 0, GLOBAL_BATCH)], steps)
        digests = {shape: order(data, [shape], steps) for shape in shapes}
        # Three resumes: the second and third must be as exact as the first.
        changed = order(data, [(2, 1, 12), (3, 0, 4), (1, 2, 24), (8, 4, 3)], steps)
    finally:
        data.close()
    return {"digest": truth, "shapes": len(shapes), "shapes_with_that_digest": sum(d == truth for d in digests.values()),
            "other_shapes": [list(shape) for shape, digest in digests.items() if digest != truth],
            "resumed_three_times_at_other_shapes": "equal" if changed == truth else "differs",
            "samples": steps * GLOBAL_BATCH, "order": str(data.plan().get("order", "mixture")),
            "seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24, help="global batches of 24 samples; the folder's epoch has about 4.5")
    parser.add_argument("--only", help="sources, separated by commas")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    sources.MEMORY_LIMIT = image_sources.MEMORY_LIMIT = 0
    result = circumstances(["torch", "datasets", "pyarrow"])
    result |= {"world_sizes": WORLD_SIZES, "workers": WORKERS, "micro_batches": "all, a third and one of a rank's samples",
               "global_batch_size": GLOBAL_BATCH, "sources": {}}
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as url:
        folder = Path(name)
        write_sources(folder)
        for source, settings in settings_of(folder, url).items():
            if not arguments.only or source in arguments.only.split(","):
                result["sources"][source] = measure(settings, arguments.steps)
                print(source, result["sources"][source], file=sys.stderr, flush=True)
    write(result, arguments.out)
    if any(row["other_shapes"] or row["resumed_three_times_at_other_shapes"] != "equal" for row in result["sources"].values()):
        sys.exit("the order depends on the shape")


if __name__ == "__main__":
    main()
