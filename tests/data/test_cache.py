"""The token cache decides about speed and never about samples: every comparison is with the same data without it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS, merge_states
from genscale.data.readers import TableShard
from genscale.data.text import cache as cache_module
from genscale.data.text import sources
from genscale.data.text.cache_build import build, work_of
from genscale.data.text.data import TextData, TextDataSettings, train_tokenizer
from genscale.data.text.encoded import open_encoded
from genscale.data.text.tokenizers import ByteTokenizer
from genscale.errors import UserError

LANES = 6


def text(i: int) -> str:
    words = ["naïve", "東京", "the", "of", "token", "cache\n", "x" * (i % 7), "ß"]
    return f"document {i} " + " ".join(words[(i * k) % len(words)] for k in range(1 + i * 37 % 90))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four .jsonl files; two of the documents take several pieces."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [text(i) for i in range(240)]
    documents[17] = "long é " * 6000
    documents[130] = "".join(f"line {i}\n" for i in range(5000))
    for number in range(4):
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents[number::4])
    return folder


@pytest.fixture(scope="module")
def bpe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_tokenizer(TextDataSettings(source=str(corpus)), 400, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(params=["memory", "stream"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stream":
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    return request.param


@pytest.fixture
def make(corpus: Path, bpe: str) -> Callable[..., TextData]:
    def make(cache: Path | None = None, seed: int = 1, **changes: Any) -> TextData:
        chosen = {"source": str(corpus), "tokenizer": bpe, "lanes": LANES, "sequence_length": 64, "shuffle_window": 16,
                  "validation_fraction": 0.1, **changes}
        return TextData(TextDataSettings(**chosen, cache=cache and str(cache)), seed)
    return make


def blocks(data: TextData, epochs: int) -> Iterator[tuple[list[int], dict]]:
    """All lanes in turn, as in training, until every one of them is past so many epochs."""
    lanes = [data.open_lane(lane) for lane in range(data.lane_count)]
    while True:
        row = [next(lane) for lane in lanes]
        yield from ((sample["tokens"].tolist(), position(cursor)) for sample, cursor in row)
        if min(cursor["place"]["epoch"] for _, cursor in row) >= epochs:
            return


def position(cursor: dict) -> dict:
    """A cursor without the byte at which reading goes on, of which only those who read know."""
    return {**cursor, "place": {key: value for key, value in cursor["place"].items() if key != "at"}}


def tokenised(data: TextData) -> int:
    return sum(stream.encoded.tokenised for stream in data.streams)


def fill(data: TextData) -> None:
    encoded = [stream.encoded for stream in data.streams]
    build(encoded, work_of(encoded, 1)[0], 1, lambda *_: None, lambda: False)


def test_same_samples_and_cursors_writing_and_reading(make: Callable[..., TextData], kind: str, tmp_path: Path) -> None:
    plain = make()
    expected = list(blocks(plain, 2))
    writing = make(tmp_path / "cache")
    assert list(blocks(writing, 2)) == expected
    writing.close()
    reading = make(tmp_path / "cache")
    assert list(blocks(reading, 2)) == expected
    divided = tokens_in_no_cache(plain, epochs=2)
    assert tokenised(reading) <= divided
    assert tokenised(writing) <= 0.55 * tokenised(plain) + divided  # already the second epoch was read


def tokens_in_no_cache(data: TextData, epochs: int) -> int:
    """Of pieces that a lane boundary divides, in the epochs from 0 to `epochs`."""
    source = data.streams[0].source
    windows = [window for lane in range(LANES) for window in islice(source.windows(lane), epochs + 1)]
    stretches = (stretch for window in windows for document in window.limits for stretch in window.stretches(document))
    return sum(len(data.tokenizer.encode(stretch.text)) + 1 for stretch in stretches if not stretch.whole)


def test_resumed_anywhere_with_another_process_writing(make: Callable[..., TextData], kind: str, tmp_path: Path) -> None:
    lane = list(islice(make().open_lane(2), 160))
    assert lane[-1][1]["place"]["epoch"] >= 1
    other = make(tmp_path / "cache")
    other_lane = other.open_lane(3)
    for i in range(0, 100, 12):
        list(islice(other_lane, 20))
        other.streams[0].encoded.cache.flush()
        resumed = pickle.loads(pickle.dumps(make(tmp_path / "cache"))).open_lane(2, json.loads(json.dumps(lane[i][1])))
        for (sample, cursor), (wanted, after) in zip(islice(resumed, 10), lane[i + 1 :], strict=False):
            np.testing.assert_array_equal(sample["tokens"], wanted["tokens"])
            assert position(cursor) == position(after)


def digests(data: Callable[[], TextData], world_size: int, batches: int, workers: int = 0,
            state: dict | None = None) -> tuple[list[int], dict]:
    """Of every global batch, summed over ranks that each have a `TextData`, as processes do."""
    ranks = [data() for _ in range(world_size)]
    loaders = [StepLoader(own, global_batch_size=6, micro_batch_size=1, rank=rank, world_size=world_size, workers=workers,
                          prefetch_steps=2, state=state) for rank, own in enumerate(ranks)]
    found = []
    for _ in range(batches):
        for loader in loaders:
            loader.next_batch()
        found.append(sum(loader.digest() for loader in loaders) % DIGEST_MODULUS)
    state = merge_states([loader.state() for loader in loaders], LANES)
    for loader, own in zip(loaders, ranks, strict=True):
        loader.close()
        own.close()
    return found, state


def test_same_global_batches_at_any_shape_and_across_resumes(make: Callable[..., TextData], kind: str, tmp_path: Path) -> None:
    expected, _ = digests(make, 1, 320)
    found, state = [], None
    for world_size in (1, 2, 3, 6):
        part, state = digests(lambda: make(tmp_path / "cache"), world_size, 80, state=state)
        found += part
    assert found == expected


def test_same_global_batches_from_worker_processes(make: Callable[..., TextData], tmp_path: Path) -> None:
    fill(make(tmp_path / "half", validation_fraction=0.1))
    expected, _ = digests(make, 1, 30)
    assert digests(lambda: make(tmp_path / "cache"), 1, 30, workers=2)[0] == expected
    assert digests(lambda: make(tmp_path / "half"), 1, 30, workers=2)[0] == expected


def test_one_cache_serves_every_seed_lane_count_and_length(make: Callable[..., TextData], kind: str, tmp_path: Path) -> None:
    fill(make(tmp_path / "cache"))
    for changes in ({"seed": 2, "sequence_length": 100}, {"lanes": 4, "shuffle_window": 50}):
        data = make(tmp_path / "cache", **changes)
        assert list(blocks(data, 1)) == list(blocks(make(**changes), 1))
        assert tokenised(data) == 0 or kind == "memory"


def test_a_stream_whose_text_is_cached_is_not_opened(make: Callable[..., TextData], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    expected = list(blocks(make(), 2))
    ready = make(tmp_path / "written")  # its epoch is written by reading it: 4 shards in 6 lanes, in residues of rows
    list(blocks(ready, 1))
    ready.close()
    fill(make(tmp_path / "built"))
    opened = []
    rows = TableShard.rows
    for folder in ("written", "built"):
        data = make(tmp_path / folder)

        def noted(shard: TableShard, *place: int) -> Iterator[tuple[int, str]]:
            opened.append(shard.name)
            return rows(shard, *place)
        with monkeypatch.context() as patch:
            patch.setattr(TableShard, "rows", noted)
            assert list(blocks(data, 2)) == expected
        assert opened == []


@pytest.mark.parametrize(("kind", "damage"), [
    ("memory", "index cut"), ("stream", "tokens cut"), ("memory", "index zeroed"), ("stream", "a segment gone"),
    ("stream", "ends cut"), ("memory", "tokens cut"),
], indirect=["kind"])
def test_whatever_is_lost_is_read_again(make: Callable[..., TextData], kind: str, tmp_path: Path, damage: str) -> None:
    expected = list(blocks(make(), 1))
    fill(make(tmp_path / "cache"))
    index = max((tmp_path / "cache").rglob("*.index"), key=lambda path: path.stat().st_size)
    content = index.read_bytes()
    if damage == "index cut":
        index.write_bytes(content[: len(content) // 2 + 5])
    elif damage == "tokens cut":
        tokens = index.with_suffix(".tokens")
        tokens.write_bytes(tokens.read_bytes()[: tokens.stat().st_size // 2 + 1])
    elif damage == "index zeroed":  # what a file system may leave after the machine lost power
        index.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    elif damage == "ends cut":
        index.with_suffix(".ends").write_text(index.with_suffix(".ends").read_text()[:-5])
    else:
        index.unlink()
        index.with_suffix(".tokens").unlink()
    data = make(tmp_path / "cache")
    assert list(blocks(data, 1)) == expected
    assert tokenised(data) > 0 or damage == "ends cut"


def test_a_cache_removed_while_it_is_used(make: Callable[..., TextData], kind: str, tmp_path: Path,
                                          caplog: pytest.LogCaptureFixture) -> None:
    import shutil

    expected = list(blocks(make(), 2))
    fill(make(tmp_path / "cache"))
    data = make(tmp_path / "cache")
    found = []
    for number, block in enumerate(blocks(data, 2)):
        found.append(block)
        if number == 40:
            shutil.rmtree(tmp_path / "cache")
    data.close()
    assert found == expected
    assert not (tmp_path / "cache").exists()


class WideTokenizer(ByteTokenizer):
    """Ids that do not fit in 16 bits."""

    vocab_size = 70_000
    digest = "wide"

    def encode_documents(self, texts: Any, ends: Any) -> list[np.ndarray]:
        return [ids + 69_000 for ids in super().encode_documents(texts, ends)]


def test_large_vocabularies_keep_their_ids(make: Callable[..., TextData], tmp_path: Path) -> None:
    source = make().streams[0].source
    encoded = open_encoded(source, WideTokenizer(), tmp_path / "cache")
    build([encoded], work_of([encoded], 1)[0], 1, lambda *_: None, lambda: False)
    again = open_encoded(source, WideTokenizer(), tmp_path / "cache")
    found = [block.tolist() for block, _, _ in islice(again.blocks(0, None, 64), 50)]
    plain = open_encoded(source, WideTokenizer(), None)
    assert found == [block.tolist() for block, _, _ in islice(plain.blocks(0, None, 64), 50)]
    assert again.cache.token.itemsize == 4 and max(map(max, found)) > 2**16


def test_manifest_can_be_read_by_a_person(make: Callable[..., TextData], kind: str, tmp_path: Path) -> None:
    data = make(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["tokenizer"] == data.tokenizer.digest and manifest["layout"] == cache_module.LAYOUT
    assert manifest["source"]["order"] == kind and manifest["source"]["validation_fraction"] == 0.1


def spoil(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize(("changes", "spoiled", "words"), [
    ({"tokenizer": "bytes"}, None, ["another tokenizer", "remove it"]),
    ({"validation_fraction": 0.2}, None, ["another source", "validation_fraction 0.1, not 0.2"]),
    ({"source": "python-docs"}, None, ["another source", "content"]),
    ({}, spoil("manifest.json", '{"layout": 0}'), ["layout 0", "reads layout 1", "remove it"]),
    ({}, spoil("manifest.json", '{"layo'), ["manifest.json is damaged"]),
    ({}, lambda folder: (folder / "manifest.json").unlink(), ["something else than a token cache", "empty"]),
])
def test_a_cache_of_something_else_is_one_clear_line(make: Callable[..., TextData], tmp_path: Path, changes: dict, spoiled: Any,
                                                     words: list[str]) -> None:
    fill(make(tmp_path / "cache"))
    if spoiled:
        spoiled(tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        make(tmp_path / "cache", **changes)
    message = str(caught.value)
    assert message.startswith(f"data.cache={tmp_path / 'cache'}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_a_replaced_file_of_the_same_size_is_another_source(make: Callable[..., TextData], corpus: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in corpus.glob("*.jsonl"):
        (copy / file.name).write_bytes(file.read_bytes())
    fill(make(tmp_path / "cache"))
    fill(make(tmp_path / "cache", source=str(copy)))  # the same elsewhere
    content = (copy / "1.jsonl").read_text()
    (copy / "1.jsonl").write_text(content.replace("document 1 ", "dokument 1 "))
    with pytest.raises(UserError, match="data.cache=.*another source.*files"):
        make(tmp_path / "cache", source=str(copy))


def test_a_file_in_place_of_the_folder(make: Callable[..., TextData], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="data.cache=.*cannot be used .*set a folder that can be written"):
        make(tmp_path / "cache")
