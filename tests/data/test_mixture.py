"""Mixtures against their sources read alone, at any shape; shares, cursors, validation and refusals."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS, merge_states
from genscale.data.text import sources
from genscale.data.text.data import SourceSettings, TextData, TextDataSettings, train_tokenizer
from genscale.data.text.mixture import allot, choices, interleave
from genscale.data.text.sources import HASHES, text_hash
from genscale.errors import UserError

WORDS = {"a": "alpha", "b": "beta", "c": "gamma"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources whose texts tell where they are from."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, word in WORDS.items():
        lines = [json.dumps({"body": f"{word} {i} " * (3 + i % 9)}) for i in range(90)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def mixed(corpora: Path, weights: dict[str, float], **changes: Any) -> TextData:
    entries = [SourceSettings(str(corpora / f"{name}.jsonl"), weight) for name, weight in weights.items()]
    chosen = {"sources": entries, "column": "body", "lanes": 6, "sequence_length": 16, **changes}
    return TextData(TextDataSettings(**chosen), seed=3)


def alone(corpora: Path, name: str) -> TextData:
    return TextData(TextDataSettings(source=str(corpora / f"{name}.jsonl"), column="body", lanes=6, sequence_length=16), seed=3)


def test_each_block_is_the_next_of_the_source_drawn_for_it(corpora: Path) -> None:
    weights = {"a": 1, "b": 2, "c": 5}
    data = mixed(corpora, weights)
    for lane in (0, 5):
        lanes = [alone(corpora, name).open_lane(lane) for name in weights]
        drawn = islice(choices(list(weights.values()), 3, lane, 0), 400)
        for source, (sample, _) in zip(drawn, data.open_lane(lane), strict=False):
            np.testing.assert_array_equal(sample["tokens"], next(lanes[source])[0]["tokens"])


def test_weights_are_shares_of_the_blocks() -> None:
    drawn = np.array([list(islice(choices([1, 0.5, 2.5], 7, lane, 0), 4000)) for lane in range(8)])
    shares = np.bincount(drawn.ravel()) / drawn.size
    np.testing.assert_allclose(shares, [0.25, 0.125, 0.625], atol=4 * 0.5 / np.sqrt(drawn.size))
    assert len({tuple(row[:50]) for row in drawn.tolist()}) == 8  # the lanes do not turn to a source all at once
    for position in (1, 1023, 1024, 3000):
        assert list(islice(choices([1, 0.5, 2.5], 7, 2, position), 900)) == drawn[2, position : position + 900].tolist()


def test_a_lane_resumed_at_every_sample_is_the_undisturbed_lane(corpora: Path) -> None:
    data = mixed(corpora, {"a": 1, "b": 3})
    undisturbed = list(islice(data.open_lane(1), 200))
    cursor = None
    for i, (sample, after) in enumerate(undisturbed):
        if i % 3 == 0:
            lane = pickle.loads(pickle.dumps(data)).open_lane(1, json.loads(json.dumps(cursor)))
        again, cursor = next(lane)
        np.testing.assert_array_equal(again["tokens"], sample["tokens"])
        assert cursor == after
    assert undisturbed[-1][1]["sources"][1]["place"]["epoch"] >= 1


def run(data: TextData, batches: int, world: int, workers: int, state: dict | None = None) -> tuple[list, list, dict]:
    """All ranks of a run: (tokens of each global sample, ledger, merged state)."""
    samples: dict[int, bytes] = {}
    ledger, states = [0] * batches, []
    for rank in range(world):
        loader = StepLoader(data, global_batch_size=6, micro_batch_size=6 // world, rank=rank, world_size=world,
                            workers=workers, prefetch_steps=2, state=json.loads(json.dumps(state)))
        for k in range(batches):
            for batch in loader.next_batch():
                samples |= zip(batch["sample"].tolist(), (row.numpy().tobytes() for row in batch["tokens"]), strict=True)
            ledger[k] = (ledger[k] + loader.digest()) % DIGEST_MODULUS
        states.append(loader.state())
        loader.close()
    return [samples[g] for g in sorted(samples)], ledger, merge_states(states, data.lane_count)


def test_same_global_batches_at_any_shape_and_across_a_change_of_shape(corpora: Path) -> None:
    data = mixed(corpora, {"a": 1, "b": 2, "c": 1})
    expected, ledger, end = run(data, 12, world=1, workers=0)
    found, entries, state = [], [], None
    for world, workers, count in [(2, 0, 3), (3, 2, 4), (1, 1, 5)]:
        samples, more, state = run(data, count, world, workers, state)
        found, entries = found + samples, entries + more
    assert found == expected and entries == ledger and state == end
    counts = data.tokens_per_source(state["cursors"])
    assert list(counts) == ["a", "b", "c"] and sum(counts.values()) == 12 * 6 * 16
    drawn = [source for lane in range(6) for source in islice(choices([1, 2, 1], 3, lane, 0), 12)]
    assert list(counts.values()) == [16 * drawn.count(i) for i in range(3)]


def words_of(data: TextData, samples: list[dict]) -> list[str]:
    texts = [data.tokenizer.decode([max(int(token), 256) if token < 0 else int(token) for token in sample["tokens"]])
             for sample in samples]
    return [max(WORDS, key=lambda name: text.count(WORDS[name])) for text in texts]


def test_validation_holds_every_source_in_proportion(corpora: Path) -> None:
    data = mixed(corpora, {"a": 1, "b": 3}, validation_blocks=12)
    found = words_of(data, data.validation())
    assert found == ["a"] * 3 + ["b"] * 9
    held = [alone(corpora, name).validation() for name in "ab"]
    for sample, other in zip(data.validation(), held[0][:3] + held[1][:9], strict=True):
        np.testing.assert_array_equal(sample["tokens"], other["tokens"])
    other = mixed(corpora, {"a": 1, "b": 3}, validation_source=str(corpora / "c.jsonl"), validation_blocks=5)
    assert words_of(other, other.validation()) == ["c"] * 5


@pytest.mark.parametrize("streamed", [False, True])
def test_no_source_trains_on_what_another_holds_out(tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that share texts, one so small that its share is no document, one in memory beside one streamed."""
    texts = [f"text {i} " * 5 for i in range(400)]
    few = [text for text in texts if text_hash(text) >= 0.2 * HASHES][:12]
    for name, own in {"most": texts[:300], "some": texts[200:], "few": few}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in own))
    if streamed:
        monkeypatch.setattr(sources, "MEMORY_LIMIT", (tmp_path / "few.jsonl").stat().st_size)
    entries = [SourceSettings(str(tmp_path / f"{name}.jsonl")) for name in ("most", "some", "few")]
    data = TextData(TextDataSettings(sources=entries, lanes=2, sequence_length=16, validation_fraction=0.1), seed=1)
    assert [stream.source.plan()["order"] for stream in data.streams] == ["stream" if streamed else "memory"] * 2 + ["memory"]
    trained = {text for stream in data.streams for text in stream.source.documents()}
    held = {text for stream in data.streams for text in stream.source.held_out()}
    assert held == {text for text in texts if text_hash(text) < 0.1 * HASHES} and trained == set(texts) - held
    alone = TextData(TextDataSettings(source=str(tmp_path / "few.jsonl"), lanes=2, sequence_length=16,
                                      validation_fraction=0.1), seed=1)
    assert list(alone.streams[0].source.held_out()) == [min(few, key=text_hash)]  # never an empty validation set


def test_parts_are_whole_and_none_is_left_out() -> None:
    assert allot(64, [1, 1, 2]) == [16, 16, 32]
    assert allot(10, [1, 1, 1]) == [4, 3, 3]
    assert allot(8, [1000, 1]) == [8, 1]


def test_plan_covers_every_source(corpora: Path, tmp_path: Path) -> None:
    plan = mixed(corpora, {"a": 1, "b": 2}).plan()
    assert json.loads(json.dumps(plan)) == plan == mixed(corpora, {"a": 1, "b": 2}, workers=2).plan()

    def differing(data: TextData) -> set[str]:
        return {key for key in plan.keys() | data.plan().keys() if plan.get(key) != data.plan().get(key)}
    assert differing(mixed(corpora, {"a": 1, "b": 3})) == {"data.sources[1].weight"}
    assert {"data.sources[1].content"} <= differing(mixed(corpora, {"a": 1, "c": 2})) <= {
        f"data.sources[1].{key}" for key in ("content", "bytes", "documents")}


def test_a_source_of_weight_zero_is_not_read(corpora: Path) -> None:
    (corpora / "broken.jsonl").write_text("this is not JSON")
    data = mixed(corpora, {"a": 1, "broken": 0, "b": 1})
    assert [stream.label for stream in data.streams] == ["a", "b"]
    assert set(data.plan()) >= {"data.sources[0].content", "data.sources[2].content"}


def test_a_cache_has_a_folder_for_each_source(corpora: Path, tmp_path: Path) -> None:
    plain, cached = mixed(corpora, {"a": 1, "b": 1}), mixed(corpora, {"a": 1, "b": 1}, cache=str(tmp_path / "cache"))
    expected = [sample["tokens"].tolist() for sample, _ in islice(plain.open_lane(0), 300)]
    for _ in range(2):  # writing, then reading
        assert [sample["tokens"].tolist() for sample, _ in islice(cached.open_lane(0), 300)] == expected
        cached.close()
        cached = mixed(corpora, {"a": 1, "b": 1}, cache=str(tmp_path / "cache"))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("entries", "changes", "words"), [
    ([("a", 1), ("b", -2)], {}, ["data.sources[1].weight=-2: ", "at least 0"]),
    ([("a", float("nan"))], {}, ["data.sources[0].weight=nan: ", "finite"]),
    ([("a", 0), ("b", 0)], {}, ["data.sources[0].weight=0: ", "all weights are zero"]),
    ([], {}, ["data.sources=[]: ", "empty"]),
    ([("a", 1), ("empty", 1)], {}, ["data.sources[1].source=", "empty.jsonl: holds no text"]),
    ([("a", 1), ("missing", 1)], {}, ["data.sources[1].source=", "no such file"]),
    ([("a", 1), ("b", 1)], {"column": "text"}, ["data.sources[0].column=text: ", "has the columns body"]),
    ([("a", 1)], {"source": "somewhere"}, ["data.source=somewhere: ", "data.sources is set too"]),
    ([("a", 1), ("a", 1)], {"lanes": 10_000}, ["data.lanes=10000: ", "data.sources[0].source="]),
])
def test_bad_mixtures_are_one_clear_line(corpora: Path, entries: list, changes: dict, words: list[str]) -> None:
    (corpora / "empty.jsonl").write_text("")
    chosen = {"sources": [SourceSettings(str(corpora / f"{name}.jsonl"), weight) for name, weight in entries], "column": "body"}
    with pytest.raises(UserError) as caught:
        TextData(TextDataSettings(**{"lanes": 4, **chosen, **changes}), seed=1)
    assert str(caught.value).startswith(words[0]) or words[0] in str(caught.value), str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_column_of_one_entry_is_named(corpora: Path) -> None:
    entries = [SourceSettings(str(corpora / "a.jsonl")), SourceSettings(str(corpora / "b.jsonl"), column="boddy")]
    with pytest.raises(UserError, match=r"data.sources\[1\].column=boddy: .*did you mean 'body'"):
        TextData(TextDataSettings(sources=entries, column="body", lanes=4), seed=1)


def test_two_entries_of_one_name_are_refused_and_of_one_file_told_apart(corpora: Path) -> None:
    path = str(corpora / "a.jsonl")
    data = TextData(TextDataSettings(sources=[SourceSettings(path), SourceSettings(path)], column="body", lanes=4), seed=1)
    assert [stream.label for stream in data.streams] == ["a", "a-1"]
    entries = [SourceSettings(path, name="x"), SourceSettings(path, name="x")]
    with pytest.raises(UserError, match=r"data.sources\[1\].name=x: "):
        TextData(TextDataSettings(sources=entries, column="body", lanes=4), seed=1)


def test_less_than_one_global_batch_counts_all_sources(corpora: Path) -> None:
    data = mixed(corpora, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="data.sources has only .* blocks"):
        data.check(100_000)
    with pytest.raises(UserError, match="data.source=.*a.jsonl has only") as caught:
        alone(corpora, "a").check(100_000)
    data.check(int(str(caught.value).split("to ")[-1].split()[0]) + 10)


def test_a_vocabulary_is_learnt_from_all_sources_by_weight(corpora: Path, tmp_path: Path) -> None:
    texts = list(interleave([iter(["x" * 10] * 100), iter(["y" * 20] * 100)], [1, 3]))
    first = texts[:60]
    shares = [sum(len(text) for text in first if text[0] == letter) for letter in "xy"]
    assert abs(shares[0] / sum(shares) - 0.25) < 0.03 and len(texts) == 200
    sources = [SourceSettings(str(corpora / f"{name}.jsonl"), 1) for name in "ab"]
    settings = TextDataSettings(sources=sources, column="body", lanes=4)
    vocabulary = json.loads(train_tokenizer(settings, 400, tmp_path).read_text())["model"]["vocab"]
    assert {"Ġalpha", "Ġbeta"} <= vocabulary.keys() and "Ġgamma" not in vocabulary
