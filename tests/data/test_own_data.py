"""Data sets of the user's own: the same samples for any number of processes, each once an epoch, from any position."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from genscale.data.loader import StepLoader
from genscale.data.map_data import MapData
from genscale.data.order import merge_states
from genscale.data.plans import plan_differences
from genscale.data.shard_data import ShardData
from genscale.errors import UserError

PAIRS = TensorDataset(torch.arange(100.0), torch.arange(100))
TABLE = datasets.Dataset.from_dict({"x": [float(n) for n in range(100)], "y": list(range(100))})
SHARDS = [list(zip(map(float, part), part.tolist(), strict=True)) for part in np.split(np.arange(100), [7, 8, 30, 31, 64, 90])]
STREAM = TABLE.to_iterable_dataset(num_shards=7)
STREAMED = [STREAM.shard(num_shards=7, index=i) for i in range(7)]
DATA = {
    "tensors": lambda seed=1: MapData(PAIRS, validation=20, seed=seed, lanes=12),
    "hugging face": lambda seed=1: MapData(TABLE, validation=20, seed=seed, lanes=12),
    "stream": lambda seed=1: ShardData(STREAMED, validation=[(0.5, 0)], seed=seed),
    "shards": lambda seed=1: ShardData(SHARDS, validation=[(0.5, 0)], seed=seed, window=4),
}


def read(data, steps, world_size=1, state=None, batch=12):
    """What so many steps read, (numbers by step, ledger entry by step, position after the last)."""
    loaders = [StepLoader(data, global_batch_size=batch, micro_batch_size=batch // world_size, rank=rank, world_size=world_size,
                          workers=0, prefetch_steps=1, state=state) for rank in range(world_size)]
    numbers, digests = [], []
    try:
        for _ in range(steps):
            parts = [loader.next_batch()[0] for loader in loaders]
            found = {int(g): int(y) for part in parts for g, y in zip(part["sample"], part["y"], strict=True)}
            assert all(torch.equal(part["x"], part["y"].float()) for part in parts)
            numbers.append([found[g] for g in sorted(found)])
            digests.append(sum(loader.digest() for loader in loaders) % 2**61)
        return numbers, digests, merge_states([loader.state() for loader in loaders], data.lane_count)
    finally:
        for loader in loaders:
            loader.close()


@pytest.mark.parametrize("kind", DATA)
def test_same_samples_at_any_number_of_processes_and_from_any_position(kind):
    straight, ledger, _ = read(DATA[kind](), 12)
    assert straight != read(DATA[kind](seed=2), 12)[0]
    first, ledger_first, state = read(DATA[kind](), 5, world_size=2)
    then, ledger_then, _ = read(DATA[kind](), 7, world_size=3, state=state)
    assert first + then == straight
    assert ledger_first + ledger_then == ledger


def test_threads_that_read_one_stream_do_not_move_each_other():
    """As the thread that loads ahead and one that validates may; a stream of Hugging Face counts in itself what is read."""
    data = DATA["stream"]()
    first = [int(sample["y"]) for sample, _ in islice(data.open_lane(0), 30)]

    def read_on(_: int) -> bool:
        return all([int(sample["y"]) for sample, _ in islice(data.open_lane(0), 30)] == first for _ in range(40))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read_on, range(4)))


@pytest.mark.parametrize("kind", ["tensors", "hugging face"])
def test_each_item_once_an_epoch_and_none_of_the_validation_set(kind):
    data = DATA[kind]()
    seen = [number for batch in read(data, 40)[0] for number in batch]
    held_out = {int(sample["y"]) for sample in data.validation()}
    for epoch in range(6):
        assert sorted(seen[80 * epoch : 80 * (epoch + 1)]) == sorted(set(range(100)) - held_out)
    assert seen[:80] != seen[80:160]
    assert held_out == {int(sample["y"]) for sample in DATA[kind](seed=2).validation()}


def test_each_sample_of_shards_once_an_epoch_of_its_lane():
    data = DATA["shards"]()
    for lane in range(data.lane_count):
        epochs: dict[int, Counter] = {}
        for sample, cursor in data.open_lane(lane):
            if cursor["epoch"] == 60:
                break
            epochs.setdefault(cursor["epoch"], Counter())[int(sample["y"])] += 1
        assert all(count == 1 for epoch in epochs.values() for count in epoch.values())
    dealt = [next(data.open_lane(lane))[0]["y"] for lane in range(data.lane_count)]
    assert len(set(map(int, dealt))) == data.lane_count


def test_any_cursor_of_a_shard_goes_on_right_after_it():
    data = DATA["shards"]()
    lane = data.open_lane(2)
    seen = [next(lane) for _ in range(60)]
    numbers = [int(sample["y"]) for sample, _ in seen]
    for at in range(50):
        again = data.open_lane(2, seen[at][1])
        assert [int(next(again)[0]["y"]) for _ in range(3)] == numbers[at + 1 : at + 4]


def test_another_data_set_is_another_plan():
    plan = DATA["tensors"]().plan()
    assert plan == DATA["tensors"]().plan() == DATA["hugging face"]().plan()
    shorter = MapData(TABLE.select(range(99)), validation=20, seed=1, lanes=12)
    assert "items" in plan_differences(plan, shorter.plan())
    changed = MapData(TensorDataset(torch.arange(100.0) + 1, torch.arange(100)), validation=20, seed=1, lanes=12)
    assert plan_differences(plan, changed.plan()) == ["content"]
    shards = DATA["shards"]().plan()
    assert plan_differences(shards, ShardData(SHARDS[::-1], validation=[(0.5, 0)], seed=1, window=4).plan()) == ["content"]


class Noisy(torch.utils.data.Dataset):
    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return self.draw()


@pytest.mark.parametrize("draw", [lambda: torch.rand(2), lambda: np.random.rand(), random.random,
                                  lambda: np.random.default_rng().random(3)])
def test_a_data_set_that_draws_random_numbers_is_refused(draw):
    with pytest.raises(UserError, match="draws random numbers.*draws"):
        MapData(Noisy(draw), validation=5, seed=1).check(4)


def test_mistakes_say_what_to_do():
    with pytest.raises(UserError, match="field 'text' of a sample is str.*sample=lambda"):
        MapData([{"text": "a"}] * 9, validation=1, seed=1).check(4)
    with pytest.raises(UserError, match="do not stack"):
        MapData([[1, 2], [1]] * 9, validation=1, seed=1).plan()
    with pytest.raises(UserError, match="100 is more than the 80 samples.*nearest allowed: 80"):
        DATA["tensors"]().check(100)
    with pytest.raises(UserError, match="leaves none to train on; nearest allowed: 99"):
        MapData(PAIRS, validation=100, seed=1)
    with pytest.raises(UserError, match="read only once"):
        ShardData([iter(range(9))], validation=[1], seed=1).check(4)
    with pytest.raises(UserError, match="set lanes to 7"):
        ShardData(SHARDS, validation=[1], seed=1, lanes=8)
    with pytest.raises(UserError, match="nearest allowed: 100"):
        ShardData(SHARDS, validation=[1], seed=1).check(101)


def test_items_become_arrays_of_numbers():
    sample = MapData([{"ids": [1, 2], "share": 0.5, "bf16": torch.ones(2, dtype=torch.bfloat16)}] * 3, validation=1, seed=1)
    dtypes = {name: str(array.dtype) for name, array in sample.validation()[0].items()}
    assert dtypes == {"ids": "int64", "share": "float32", "bf16": "float32"}


def test_what_no_worker_can_be_given_is_said():
    data = MapData([1.0] * 20, validation=1, seed=1, sample=lambda item: {"x": item})
    with pytest.raises(UserError, match="data.workers: 1 processes cannot be given.*set data.workers to 0"):
        StepLoader(data, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, workers=1, prefetch_steps=1)
