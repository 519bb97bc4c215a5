"""Text data as a whole: samples against a plain reading of the documents, cursors, validation, and early refusals."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings, train_tokenizer
from genscale.errors import UserError


def settings(**changes: Any) -> TextDataSettings:
    return TextDataSettings(**{"lanes": 6, "sequence_length": 32, **changes})


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_tokenizer(settings(), 400, tmp_path_factory.mktemp("bpe")))


def test_a_lane_is_its_documents_end_to_end() -> None:
    data = TextData(settings(), seed=5)
    blocks = [sample["tokens"] for sample, _ in islice(data.open_lane(2), 3000)]
    assert all(block.dtype == np.int32 and block.shape == (33,) for block in blocks)
    stream = np.concatenate([blocks[0], *[block[1:] for block in blocks[1:]]])
    expected: list[int] = []
    for piece in data.streams[0].source.read(2):
        expected += [*piece.text.encode(), *([256] if piece.ends else [])]
        if len(expected) >= len(stream):
            break
    assert piece.place["epoch"] >= 1
    np.testing.assert_array_equal(stream, expected[: len(stream)])


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_a_lane_resumed_at_every_sample_is_the_undisturbed_lane(tmp_path: Path, kind: str, bpe: str,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "stream":
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} " * (i % 20) for i in range(300)))
    data = TextData(settings(source=str(tmp_path), document="line", tokenizer=bpe, shuffle_window=16), seed=5)
    undisturbed = list(islice(data.open_lane(1), 360))
    assert undisturbed[-1][1]["place"]["epoch"] >= 1
    cursor = None
    for i, (sample, after) in enumerate(undisturbed):
        if i % 4 == 0:  # as often as anyone may resume, and in another process
            lane = pickle.loads(pickle.dumps(data)).open_lane(1, json.loads(json.dumps(cursor)))
        again, cursor = next(lane)
        np.testing.assert_array_equal(again["tokens"], sample["tokens"])
        assert cursor == after and len(json.dumps(cursor)) < 200


def test_validation_is_the_start_of_the_held_out_documents_at_any_seed_and_shape() -> None:
    data = TextData(settings(), seed=5)
    samples = data.validation()
    expected = [token for text in data.streams[0].source.held_out() for token in [*text.encode(), 256]]
    assert len(samples) == 64
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["tokens"], expected[i * 32 : i * 32 + 33])
    other = TextData(settings(lanes=4), seed=6)
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(samples, other.validation(), strict=True))
    everything = TextData(settings(validation_blocks=100_000), seed=5).validation()
    last = everything[-1]["tokens"]
    assert len(everything) == -(-(len(expected) - 1) // 32)
    assert last.tolist() == expected[(len(everything) - 1) * 32 :] + [-1] * int((last == -1).sum())


def test_validation_source_holds_nothing_out(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("a validation set of its own")
    data = TextData(settings(validation_source=str(tmp_path / "valid.txt")), seed=1)
    assert bytes(data.validation()[0]["tokens"][:27].astype(np.uint8)) == b"a validation set of its own"
    assert list(data.streams[0].source.held_out()) == []


def test_plan_names_what_the_order_depends_on(bpe: str, tmp_path: Path) -> None:
    plan = TextData(settings(), seed=1).plan()
    assert json.loads(json.dumps(plan)) == plan == TextData(settings(workers=3, prefetch_steps=5), seed=1).plan()

    def differing(data: TextData) -> set[str]:
        return {key for key, value in data.plan().items() if plan.get(key) != value}
    assert differing(TextData(settings(lanes=8), seed=2)) == {"lanes", "seed"}
    assert differing(TextData(settings(tokenizer=bpe), seed=1)) == {"tokenizer"}
    assert differing(TextData(settings(validation_fraction=0.2), seed=1)) >= {"validation_fraction", "source_documents"}
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree " + "x" * 100)
    plan = TextData(settings(source=str(tmp_path)), seed=1).plan()
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree " + "y" * 100)  # the same size
    assert differing(TextData(settings(source=str(tmp_path)), seed=1)) == {"source_content"}


def test_less_than_one_global_batch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["x" * 31] * 10))  # 10 documents of 32 tokens with their end
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "v.txt").write_text("valid")
    chosen = {"source": str(tmp_path / "a.txt"), "validation_source": str(tmp_path / "valid")}
    data = TextData(settings(**chosen), seed=1)
    data.check(10)
    with pytest.raises(UserError, match="train.global_batch_size=11: .*only 10 blocks.*train.global_batch_size to 10 at most"):
        data.check(11)
    data = TextData(settings(**chosen, sequence_length=512), seed=1)
    with pytest.raises(UserError, match="data.sequence_length to 320 at most"):
        data.check(1)


def test_check_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    (tmp_path / "valid.txt").write_text("valid")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.txt").write_text("\n".join(f"line {i} of an enormous source" for i in range(3000)))
    (tmp_path / "train" / "1.txt").write_bytes(b"\xff would be an error if it were read")
    chosen = {"source": str(tmp_path / "train"), "validation_source": str(tmp_path / "valid.txt")}
    data = TextData(settings(**chosen, document="line"), seed=1)
    data.check(64)
    with pytest.raises(UserError, match="1.txt is damaged"):
        data.check(100_000)


def test_empty_validation_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="data.validation_source=.*holds no text"):
        TextData(settings(validation_source=str(tmp_path / "empty.txt")), seed=1)
    with pytest.raises(UserError, match="data.validation_source=.*no such file"):
        TextData(settings(validation_source=str(tmp_path / "nothing.txt")), seed=1)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    (tmp_path / "a.txt").write_text("some text " * 100)
    with pytest.raises(UserError, match="data.validation_fraction=0.001: no document"):
        TextData(settings(source=str(tmp_path / "a.txt"), validation_fraction=0.001), seed=1)
