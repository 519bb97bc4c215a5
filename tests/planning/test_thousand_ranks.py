"""A run on 1,024 ranks, simulated: who draws which weights at the start, reads which lanes, and writes what of a checkpoint."""

from __future__ import annotations

from collections import Counter

import pytest

import genscale
from genscale.data.order import Share
from genscale.families import family
from genscale.parallel.dealing import rounds_of
from genscale.parallel.pieces import pieces_of

RANKS = 1024


@pytest.fixture(scope="module")
def config():
    return genscale.config("gpt/llama-8b")


@pytest.fixture(scope="module")
def weights(config):
    """Of the whole network, without storage."""
    return dict(family("gpt").blueprint(config).objective.networks["gpt"].named_parameters())


def test_at_the_start_each_tensor_is_drawn_by_one_rank_and_none_draws_much_more_than_its_share(weights):
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    drawn = Counter()
    for names in rounds_of(sizes, RANKS):
        for name, rank in names.items():
            drawn[rank] += sizes[name]
    assert sum(drawn.values()) == sum(sizes.values()) > 8e9
    assert max(drawn.values()) <= max(sizes.values())  # no more than the largest tensor, which cannot be divided


def test_every_sample_is_read_once_and_every_lane_by_one_worker_of_one_rank(config):
    batch, lanes, workers = config.train.global_batch_size, config.data.lanes, config.data.workers
    readers, samples = {}, Counter()
    for rank in range(RANKS):
        share = Share(batch, rank, RANKS, workers, lanes)
        for number in range(2):
            for worker in range(workers):
                for sample in share.samples(number, worker):
                    samples[sample] += 1
                    readers.setdefault(sample % lanes, set()).add((rank, worker))
    assert samples == Counter(range(2 * batch))
    assert {len(each) for each in readers.values()} == {1} and len(readers) == lanes
    assert {*Counter(rank for ((rank, _),) in readers.values()).values()} == {lanes // RANKS}


@pytest.mark.slow
def test_of_a_checkpoint_every_tensor_is_written_once_and_no_rank_writes_more_than_the_largest(weights):
    """Of what all ranks have alike, in some of the blocks; a shard is its rank's."""
    some = dict(list(weights.items())[:80])
    written = [sum(piece.values.nbytes for piece in pieces_of(some.items(), rank, RANKS)) for rank in range(RANKS)]
    assert sum(written) == sum(tensor.nbytes for tensor in some.values())
    assert max(written) == max(tensor.nbytes for tensor in some.values())
