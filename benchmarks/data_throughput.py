"""How fast text becomes blocks: through the tokenizer, from the token cache, and what the ledger's fingerprint adds.

    python benchmarks/data_throughput.py --source FOLDER --tokenizer FOLDER --out benchmarks/results/data-throughput-cpu.json

CPU time of the whole process is what counts (the tokenizer's threads included), in tokens a CPU-second; each figure is the
median of --repeats, taking turns. Then two epochs over the source, without a cache and with one (the first writes it, the
second reads it): every global batch of the two runs must have the same digest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from genscale.data.lanes import Sample
from genscale.data.loader import StepLoader
from genscale.data.order import fingerprint
from genscale.data.packing import cut
from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings
from report import circumstances, write

Count = Callable[[], int]  # does the work and returns its tokens


def data_of(arguments: argparse.Namespace, cache: Path | None) -> TextData:
    return TextData(TextDataSettings(source=arguments.source, tokenizer=arguments.tokenizer, sequence_length=arguments.length,
                                     validation_fraction=0.005, validation_blocks=8, cache=cache and str(cache)), seed=1)


def samples(data: TextData, blocks: int) -> Iterator[Sample]:
    """`blocks` blocks of a lane, for every lane."""
    for lane in range(data.lane_count):
        for sample, _ in islice(data.open_lane(lane), blocks):
            yield sample


def tokenizer_alone(data: TextData, size: int) -> Count:
    """The library on ready lists of documents, as large as a batch of ours: no reading, packing or arrays."""
    batches: list[list[str]] = [[]]
    total = held = 0
    for window in data.streams[0].source.windows(0):
        for document in range(len(window.rows)):
            for text in cut(window.text(document)):
                batches[-1].append(text)
                held, total = held + len(text), total + len(text)
                if held >= 2**14:
                    batches.append([])
                    held = 0
        if total > size:
            break
    backend = data.tokenizer._backend
    return lambda: sum(len(encoding.ids) for batch in batches for encoding in
                       backend.encode_batch_fast(batch, add_special_tokens=False))


def contestants(plain: TextData, cached: TextData, arguments: argparse.Namespace) -> dict[str, Count]:
    length, few, many = arguments.length, arguments.blocks_on_the_fly, arguments.blocks_from_bins

    def blocks(data: TextData, count: int, look: Callable[[int, Sample], object] | None = None) -> int:
        number = 0
        for number, sample in enumerate(samples(data, count), 1):
            if look:
                look(number, sample)
        return number * length

    return {
        "tokenizer alone": tokenizer_alone(plain, 4 * length * few * plain.lane_count),
        "on the fly": lambda: blocks(plain, few),
        "from bins": lambda: blocks(cached, many),
        "from bins, with the ledger's fingerprint": lambda: blocks(cached, many, fingerprint),
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    plain, cached = data_of(arguments, None), data_of(arguments, folder / "built")
    encoded = [cached.streams[0].encoded]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)
    rates: dict[str, list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for name, count in contestants(plain, cached, arguments).items():
            started = time.process_time()
            tokens = count()
            seconds = time.process_time() - started
            if repeat:  # the first time finds nothing in memory
                rates.setdefault(name, []).append(tokens / seconds / 1e6)
    return {name: {"million_tokens_a_cpu_second": round(statistics.median(values), 3), "lowest": round(min(values), 3),
                   "highest": round(max(values), 3)} for name, values in rates.items()}


def digests(data: TextData, epochs: int, global_batch_size: int) -> tuple[list[int], list[float]]:
    """Of every global batch until some lane is past so many epochs; and the CPU-seconds of each epoch."""
    loader = StepLoader(data, global_batch_size=global_batch_size, micro_batch_size=global_batch_size, rank=0, world_size=1,
                        workers=0, prefetch_steps=2)
    found, seconds, started = [], [], time.process_time()
    while len(seconds) < epochs:
        loader.next_batch()
        found.append(loader.digest())
        epoch = min(entry["cursor"]["place"]["epoch"] for entry in loader.state()["cursors"].values())
        if epoch > len(seconds):
            seconds.append(time.process_time() - started)
            started = time.process_time()
    loader.close()
    data.close()
    return found, [round(value, 2) for value in seconds]


def two_epochs(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    expected, plain = digests(data_of(arguments, None), 2, 48)
    written = data_of(arguments, folder / "written")
    found, cached = digests(written, 2, 48)
    if found != expected:
        raise SystemExit("the run with the cache saw other samples than the run without")
    totals = written.streams[0].encoded.cache.totals(len(written.streams[0].source.sizes()))
    return {"global_batches": len(found), "tokens": len(found) * 48 * arguments.length, "digests_equal": True,
            "cpu_seconds_of_the_epochs": {"without cache": plain, "with cache": cached}, "cache": totals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="data.source")
    parser.add_argument("--tokenizer", required=True, help="data.tokenizer, a tokenizer.json or its folder")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks-on-the-fly", type=int, default=40, help="blocks of each lane a measurement")
    parser.add_argument("--blocks-from-bins", type=int, default=400, help="blocks of each lane a measurement")
    parser.add_argument("--epochs-too", action=argparse.BooleanOptionalAction, default=True, help="also run the two epochs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    about = circumstances(["numpy", "orjson", "tokenizers", "datasets", "xxhash"])
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {"throughput": measure(arguments, Path(folder))}
        print(json.dumps(results["throughput"], indent=1), flush=True)
        if arguments.epochs_too:
            results["two_epochs"] = two_epochs(arguments, Path(folder))
            print(json.dumps(results["two_epochs"], indent=1), flush=True)
    config = {name: value for name, value in vars(arguments).items() if name not in ("out", "source", "tokenizer")}
    config |= {"source": Path(arguments.source).name, "tokenizer": Path(arguments.tokenizer).name}
    write({**about, "config": config, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
