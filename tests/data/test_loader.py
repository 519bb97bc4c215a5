"""The loader at many shapes against the lanes read one sample at a time: same samples, same order, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genscale.data import packing
from genscale.data.loader import StepLoader
from genscale.data.order import DIGEST_MODULUS, merge_states
from genscale.data.text import sources
from genscale.data.text.data import TextData, TextDataSettings
from genscale.errors import UserError

GLOBAL = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    for name in range(3):
        lines = [json.dumps({"text": f"file {name} line {i} " + "abcdefg"[: i % 7] * (i % 23)}) for i in range(60)]
        (path / f"{name}.jsonl").write_text("\n".join(lines))
    return path


def text_data(corpus: Path, lanes: int = 12) -> TextData:
    return TextData(TextDataSettings(source=str(corpus), lanes=lanes, sequence_length=16, shuffle_window=8), seed=3)


def truth(data: TextData, count: int) -> list[bytes]:
    """The first global samples, from the definition: sample g is number g // lanes of lane g % lanes."""
    lanes = [data.open_lane(lane) for lane in range(data.lane_count)]
    return [next(lanes[g % data.lane_count])[0]["tokens"].tobytes() for g in range(count)]


def train(data: TextData, batches: int, world: int, workers: int, micro: int,
          state: dict[str, Any] | None = None) -> tuple[list[list[bytes]], list[int], dict[str, Any]]:
    """All ranks of a run, one after the other: (samples of each global batch by number, ledger, merged state)."""
    samples: list[dict[int, bytes]] = [{} for _ in range(batches)]
    ledger, states = [0] * batches, []
    for rank in range(world):
        loader = StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=micro, rank=rank, world_size=world,
                            workers=workers, prefetch_steps=2, state=json.loads(json.dumps(state)))
        for k in range(batches):
            micros = loader.next_batch()
            assert len(micros) == GLOBAL // (world * micro)
            numbers = torch.cat([batch["sample"] for batch in micros]).tolist()
            assert numbers == sorted(numbers) and all(g % world == rank for g in numbers)
            for batch in micros:
                assert batch["tokens"].shape == (micro, 17) and batch["tokens"].dtype == torch.int64
                for g, row in zip(batch["sample"].tolist(), batch["tokens"].numpy().astype(np.int32), strict=True):
                    assert g not in samples[k]
                    samples[k][g] = row.tobytes()
            ledger[k] = (ledger[k] + loader.digest()) % DIGEST_MODULUS
        states.append(json.loads(json.dumps(loader.state())))
        loader.close()
    first = state["batches"] if state else 0
    for k, batch in enumerate(samples, first):
        assert sorted(batch) == list(range(k * GLOBAL, (k + 1) * GLOBAL))
    return [[batch[g] for g in sorted(batch)] for batch in samples], ledger, merge_states(states, data.lane_count)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("lanes", [12, 10])  # 10: neither batch, ranks nor workers divide the lanes
def test_same_global_batches_at_any_shape_and_across_a_change_of_shape(corpus: Path, lanes: int, workers: int) -> None:
    data = text_data(corpus, lanes)
    expected = truth(data, 9 * GLOBAL)
    batches = [expected[k * GLOBAL : (k + 1) * GLOBAL] for k in range(9)]
    _, ledger, _ = train(data, 9, world=1, workers=0, micro=12)
    assert len(set(ledger)) == 9
    state, done = None, 0
    # One run, resized twice on its way: each leg continues from the merged state of the one before.
    for world, micro, count in [(2, 3, 2), (4, 3, 3), (1, 4, 4)] if workers else [(2, 3, 2), (3, 2, 3), (6, 2, 1), (4, 1, 3)]:
        samples, entries, state = train(data, count, world, workers, micro, state)
        assert samples == batches[done : done + count]
        assert entries == ledger[done : done + count]
        done += count
        assert state["batches"] == done
        # Read exactly as far as the samples consumed, whatever was loaded ahead.
        positions = {int(lane): entry["position"] for lane, entry in state["cursors"].items()}
        assert positions == {lane: len(range(lane, done * GLOBAL, lanes)) for lane in range(lanes) if lane < done * GLOBAL}
    assert done == 9


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("streamed", [False, True])
def test_worlds_and_micro_batches(corpus: Path, world: int, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if streamed:
        monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
        monkeypatch.setattr(packing, "PIECE", 256)  # else every lane first reads this small corpus many times over
    data = text_data(corpus)
    expected = truth(data, 7 * GLOBAL)
    for micro in {1, GLOBAL // world}:
        first, ledger, state = train(data, 3, world, 0, micro)
        second, more, _ = train(data, 4, world, 0, micro, state)
        assert list(chain(*first, *second)) == expected
        assert ledger + more == train(data, 7, 1, 0, 4)[1]


def test_state_is_what_was_consumed_and_a_lost_rank_costs_only_time(corpus: Path) -> None:
    data = text_data(corpus, lanes=10)
    expected = truth(data, 4 * GLOBAL)
    states = []
    for rank in range(2):
        loader = StepLoader(data, global_batch_size=GLOBAL, micro_batch_size=6, rank=rank, world_size=2, workers=0,
                            prefetch_steps=3)
        loader.next_batch(), loader.next_batch()
        time.sleep(0.05)  # prefetch runs ahead of what is consumed
        states.append(loader.state())
        loader.close()
    samples, _, _ = train(data, 2, 1, 0, 12, merge_states(states, 10))
    assert list(chain(*samples)) == expected[2 * GLOBAL :]
    samples, _, _ = train(data, 2, 1, 0, 12, merge_states(states[:1], 10))
    assert list(chain(*samples)) == expected[2 * GLOBAL :]
    with pytest.raises(ValueError, match="different global batches"):
        merge_states([states[0], {**states[1], "batches": 3}], 10)


def test_ledger_sees_content_and_order(corpus: Path) -> None:
    entries = [train(data, 1, 1, 0, 12)[1][0]
               for data in (text_data(corpus), text_data(corpus), TextData(text_data(corpus).settings, seed=4))]
    assert entries[0] == entries[1] != entries[2]


def test_batches_that_do_not_divide_are_refused(corpus: Path) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        StepLoader(text_data(corpus), global_batch_size=12, micro_batch_size=5, rank=0, world_size=1, workers=0,
                   prefetch_steps=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_surface_as_themselves_and_closing_is_prompt(tmp_path: Path, workers: int,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 0)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(400)))
    data = TextData(TextDataSettings(source=str(tmp_path), lanes=4, sequence_length=8, validation_fraction=0.3), seed=1)
    data.check(8)
    (tmp_path / "a.jsonl").write_text('{"text": "damaged\n{')
    before = torch.get_rng_state()
    loader = StepLoader(data, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1, workers=workers, prefetch_steps=2)
    with pytest.raises(UserError) as caught:
        for _ in range(100):
            loader.next_batch()
    assert str(caught.value).startswith(f"data.source={tmp_path}: {tmp_path}/a.jsonl has changed since the run started (was ")
    assert torch.equal(torch.get_rng_state(), before), "loading must not draw from the run's own generator"
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_early_is_prompt(corpus: Path, workers: int) -> None:
    loader = StepLoader(text_data(corpus), global_batch_size=12, micro_batch_size=12, rank=0, world_size=1, workers=workers,
                        prefetch_steps=4)
    loader.next_batch()
    assert 0 <= loader.wait_seconds < 60
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 1.0
    with pytest.raises(RuntimeError, match="closed"):
        for _ in range(10):
            loader.next_batch()


SCRIPT = """
import os, signal, sys, time
from genscale.data.loader import StepLoader
from genscale.data.text.data import TextData, TextDataSettings

if __name__ == "__main__":
    data = TextData(TextDataSettings(), seed=1)
    loader = StepLoader(data, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, workers=1, prefetch_steps=1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer takes note of them and goes on to the end of the step
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    loader.next_batch()
    pids = [worker.pid for worker in loader._parts._iterator._workers]
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    for _ in range(5):
        loader.next_batch()
    print(*pids, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


@pytest.mark.parametrize("ending", ["wait", "return"])
def test_workers_outlive_signals_to_the_group_but_not_the_trainer(tmp_path: Path, ending: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py"), ending], stdout=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": root})
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids, "the loader did not survive Ctrl-C and SIGTERM to its process group"
    if ending == "wait":
        process.send_signal(signal.SIGKILL)
    # "return": a loader that nobody closed does not keep the interpreter from ending.
    process.wait(timeout=20)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
