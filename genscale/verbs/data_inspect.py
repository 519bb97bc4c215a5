"""What a run would train on, for people to read: blocks decoded, documents' lengths, tokens per source, bytes per token."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np

from genscale.data.lanes import Sample
from genscale.data.text.data import TextData, TextDataSettings
from genscale.data.text.stream import TextStream, plain_documents
from genscale.data.text.tokenizers import Tokenizer

WIDTH = 110
LINES = 6
"""Lines shown of a document's stretch in a block."""
SAMPLED = 1000
"""Documents of each source that are measured, as a lane shuffles them."""
SAMPLED_BYTES = 2**22
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


def inspect(settings: TextDataSettings, seed: int, blocks: int) -> int:
    """Print it. Raises UserError as a run would."""
    data = TextData(settings, seed)
    samples = [_labelled(data, number) for number in range(blocks)]
    for number, (sample, label) in enumerate(samples):
        print("\n".join(_block(number, number % data.lane_count, sample, label, data.tokenizer)))
    print("documents" + (f" (the first {SAMPLED:,} that the first lanes read)" if blocks else ""))
    width = max(len(stream.label) for stream in data.streams)
    for stream in data.streams:
        print("\n".join(_source(stream, data.lane_count, width)))
    drawn = Counter(label for _, label in samples if label)
    if drawn:
        total = sum(stream.weight for stream in data.streams)
        shares = (f"{stream.label} {100 * stream.weight / total:.1f} %" for stream in data.streams)
        print(f"tokens per source, by weight: {', '.join(shares)}")
    data.close()
    return 0


def _labelled(data: TextData, number: int) -> tuple[Sample, str]:
    """Global sample `number`, and which of several sources it came from."""
    position, lane = divmod(number, data.lane_count)
    before: dict[str, int] = {}
    counts: dict[str, int] = {}
    for sample, cursor in islice(data.open_lane(lane), position + 1):  # noqa: B007 (the last one is what is wanted)
        before, counts = counts, data.tokens_per_source({str(lane): {"cursor": cursor}})
    return sample, next((name for name, count in counts.items() if count != before.get(name, 0)), "")


def _block(number: int, lane: int, sample: Sample, label: str, tokenizer: Tokenizer) -> Iterator[str]:
    tokens = sample["tokens"]
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    parts = [part for part in np.split(tokens, ends + 1) if len(part)]
    learnt = f", {int(sample['mask'][1:].sum()):,} of them to be predicted" if "mask" in sample else ""
    source = f", {label}" if label else ""
    yield f"block {number} (lane {lane}{source}): {len(tokens) - 1:,} tokens{learnt}, parts of {len(parts)} document(s)"
    for index, part in enumerate(parts):
        ended = int(part[-1]) == tokenizer.end_of_text
        text = tokenizer.decode((part[:-1] if ended else part).tolist())
        lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, WIDTH) or [""]]
        if len(lines) > LINES:
            lines = [*lines[: LINES - 2], f"… {len(lines) - LINES + 1} lines more …", lines[-1]]
        yield from (f"  │ {line}" for line in lines)
        last = index == len(parts) - 1
        yield f"  {'└' if last else '├'}── " + (f"end of document ({len(part):,} tokens)" if ended else
                                              f"goes on in the next block ({len(part):,} tokens)")
    yield ""


def _source(stream: TextStream, lanes: int, width: int) -> Iterator[str]:
    texts = list(_sampled(stream, lanes))
    lengths = np.array([len(ids) for ids in stream.encode(texts)])
    size = sum(len(text.encode()) for text in plain_documents(stream.spec, texts))
    values = np.quantile(lengths, list(QUANTILES.values()), method="nearest")
    yield f"  {stream.label:<{width}}  " + ", ".join(f"{name} {int(value):,}" for name, value in
                                                     zip(QUANTILES, values, strict=True)) + f" tokens ({len(texts):,} read)"
    ratio = size / lengths.sum()
    whole = sum(stream.source.sizes())
    line = f"  {'':<{width}}  {ratio:.2f} bytes of text a token"
    if stream.encoded and stream.encoded.cache and not stream.encoded.cache.missing(stream.source.sizes()):
        totals = stream.encoded.cache.totals(len(stream.source.sizes()))
        yield f"{line}; {totals['tokens']:,} tokens in all, by the cache"
    else:
        yield line + (f"; about {whole / ratio / 1e6:,.3g} M tokens in all, by the size of its text" if whole else "")


def _sampled(stream: TextStream, lanes: int) -> Iterator[str]:
    """Training documents in the order of the lanes, whole."""
    count = size = 0
    for lane in range(lanes):
        for window in stream.source.windows(lane):
            if len(window.rows) == 0 or window.place(0, 0)["epoch"]:
                break
            for document in range(len(window.rows)):
                if window.limits.get(document, (0, 0))[0]:  # it was counted in the lane that has its beginning
                    continue
                text = window.text(document)
                count, size = count + 1, size + len(text)
                yield text
                if count == SAMPLED or size > SAMPLED_BYTES:
                    return
