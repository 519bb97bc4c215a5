"""Who reads what of a global batch, at up to 1,024 ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

import genscale
from genscale.data.order import Share, times_read
from genscale.data.text.data import TextData
from genscale.data.text.settings import TextDataSettings
from genscale.settings.shipped import shipped_names
from genscale.training.setup import shared_lanes

BATCHES = 3


def read_over_delivered(lanes: int, batch: int, ranks: int, workers: int) -> float:
    """Each reader goes through every lane that it needs a sample of, from the start to that sample."""
    read = 0
    for rank in range(ranks):
        for worker in range(workers):
            furthest = Counter()
            for number in range(BATCHES):
                for g in Share(batch, rank, ranks, workers, lanes).samples(number, worker):
                    furthest[g % lanes] = g // lanes + 1
            read += sum(furthest.values())
    return read / (BATCHES * batch)


@pytest.mark.parametrize(("lanes", "ranks", "workers", "least", "most"), [
    (96, 8, 4, 1, 1), (48, 32, 4, 1.8, 2.0), (48, 64, 1, 2.5, 4.0), (512, 64, 3, 1, 1), (10, 4, 3, 1.5, 2.0)])
def test_a_lane_is_read_by_one_worker_of_a_rank(lanes, ranks, workers, least, most):
    assert least <= read_over_delivered(lanes, ranks * 16, ranks, workers) <= most
    assert most == times_read(lanes, ranks)


@pytest.mark.parametrize("lanes", [None, 12, 10])
def test_shares_are_a_partition_in_order(lanes):
    for ranks, workers in ((1, 1), (2, 3), (3, 4), (4, 2)):
        for batch in range(4):
            found = []
            for rank in range(ranks):
                share = Share(24, rank, ranks, workers, lanes)
                slots = [slot for worker in range(workers) for slot in share.slots(batch, worker)]
                assert sorted(slots) == list(range(24 // ranks))
                found += [g for worker in range(workers) for g in share.samples(batch, worker)]
            assert sorted(found) == list(range(24 * batch, 24 * batch + 24))


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith(("gpt/gpt", "gpt/llama"))])
def test_of_the_shipped_text_configs_nothing_is_read_twice_at_any_number_of_ranks_up_to_1024(name):
    config = genscale.config(name)
    batch, lanes = config.train.global_batch_size, config.data.lanes
    ranks = [ranks for ranks in range(1, 1025) if batch % ranks == 0]
    assert [times_read(lanes, each) for each in ranks] == [1] * len(ranks)
    assert read_over_delivered(lanes, batch, ranks[-1], config.data.workers) == 1


def test_a_run_that_reads_lanes_twice_says_which_number_would_not(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f"{{\"text\": \"some words {n}\"}}\n" for n in range(2000)))
    settings = TextDataSettings(source=str(tmp_path / "a.jsonl"), lanes=48, sequence_length=16)
    data = TextData(settings, seed=1)
    said = shared_lanes(data, settings, 64)
    assert "each is read by 4 of the 64 processes" in said and "may set data.lanes 64" in said
    assert shared_lanes(data, settings, 16) is None and shared_lanes(data, replace(settings, cache="tokens"), 64) is None
