"""Run by test_cache_disk.py in a process of its own: starts processes that write to a token cache, and kills them.

    python tests/data/cache_writer.py CORPUS CACHE memory|stream KILLS

A process that forks must have no threads, which a test process has.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from itertools import islice

import datasets  # noqa: F401 (here, so that each child need not import it)

from genscale.data.text import cache, sources
from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings


def write(corpus: str, folder: str, trains: bool, ready: int) -> None:
    data = TextData(TextDataSettings(source=corpus, lanes=4, sequence_length=128, shuffle_window=32, cache=folder), seed=3)
    os.write(ready, b".")
    if trains:
        for lane in range(4):
            for _ in islice(data.open_lane(lane), 250):
                pass
    encoded = [stream.encoded for stream in data.streams]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)


def main() -> None:
    corpus, folder, kind, kills = sys.argv[1:]
    cache.FLUSH_TOKENS = 500  # small portions, so that the kill meets a write
    if kind == "stream":
        sources.MEMORY_LIMIT = 0
    draw, killed = random.Random(0), 0
    for number in range(int(kills)):
        reading, ready = os.pipe()
        process = os.fork()
        if process == 0:
            write(corpus, folder, number % 2 == 1, ready)
            os._exit(0)
        os.close(ready)
        os.read(reading, 1)
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(process, signal.SIGKILL)
        killed += os.waitpid(process, 0)[1] == signal.SIGKILL
    print(killed)


if __name__ == "__main__":
    main()
