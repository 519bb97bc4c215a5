"""What a run on images would train on, for people to read: how many, of which classes, how many damaged, how fast."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.order import LaneReader

READ = 2000
"""Images that are read, in the order of a run."""
CLASSES = 50
"""Classes shown."""
BAR = 40


def inspect_images(settings: ImageDataSettings, seed: int) -> int:
    """Print it. Raises UserError as a run would."""
    data = ImageData(settings, seed)
    total = data.order.count
    read = min(READ, total or READ)
    labels: Counter[int] = Counter()
    reader, started = LaneReader(data, {}), time.perf_counter()
    for number in range(read):
        sample, _, _ = reader.read(number)
        labels[int(sample.get("label", -1))] += 1
    seconds = time.perf_counter() - started
    known = f"{total:,} images" if total else "streamed images (it is not known how many)"
    print(f"{settings.source}: {known} to train on, {len(data.validation()):,} to validate on")
    kind = ("greyscale" if data.channels == 1 else "colour") + ", mirrored by chance" * settings.flip
    print(f"  brought to {data.size}x{data.size} pixels, crop {settings.crop}, {kind}")
    print(f"  {read:,} read with {read / seconds:,.0f} images/s by one process, {data.order.reader.bad:,} of them damaged")
    if data.classes:
        whole = data.order.class_counts()
        counts = labels if whole is None else Counter(dict(enumerate(whole)))
        print(f"  {len(data.classes)} classes" + (f", of the {read:,} images read:" if whole is None else ":"))
        print("\n".join(_histogram(data.classes, counts)))
    data.close()
    return 0


def _histogram(names: list[str], counts: Counter[int]) -> Iterator[str]:
    width, most = max(map(len, names[:CLASSES])), max(counts.values())
    for number, name in enumerate(names[:CLASSES]):
        yield f"    {name:<{width}}  {counts[number]:>8,}  {'█' * round(BAR * counts[number] / most)}"
    if len(names) > CLASSES:
        yield f"    ... {len(names) - CLASSES:,} more"
