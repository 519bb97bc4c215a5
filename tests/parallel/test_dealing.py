"""How tensors are divided among processes that read them for each other (tests/distributed/test_meta_device.py: real ones)."""

from __future__ import annotations

import pytest

from genscale.parallel.dealing import rounds_of

GPT = {"embedding": 50_000 * 64, **{f"{layer}.{name}": size for layer in range(12) for name, size in (
    ("norm", 64), ("qkv", 3 * 64 * 64), ("bias", 192), ("up", 4 * 64 * 64), ("down", 4 * 64 * 64))}}
LLAMA = {"embedding": 1002, "output": 1002, **{f"{layer}.{name}": size for layer in range(80) for name, size in (
    ("q", 64), ("k", 8), ("v", 8), ("o", 64), ("gate", 224), ("up", 224), ("down", 224))}}
"""Of 70 billion parameters, in millions of values."""


@pytest.mark.parametrize("processes", [1, 2, 3, 64, 1024])
@pytest.mark.parametrize("sizes", [GPT, LLAMA, {"only": 3}, {}], ids=["gpt", "llama", "one", "none"])
def test_each_tensor_goes_to_one_process_and_no_share_of_a_round_exceeds_the_largest_tensor(sizes, processes) -> None:
    rounds = rounds_of(sizes, processes)
    assert [name for names in rounds for name in names] == list(sizes)  # in order, each once
    for names in rounds:
        loads = [sum(sizes[name] for name, to in names.items() if to == rank) for rank in range(processes)]
        assert max(loads) <= max(sizes.values())


@pytest.mark.parametrize("processes", [2, 4, 8, 64])
def test_shares_are_even(processes) -> None:
    rounds = rounds_of(LLAMA, processes)
    time = sum(max(sum(LLAMA[name] for name, to in names.items() if to == rank) for rank in range(processes))
               for names in rounds)
    assert time < 1.4 * sum(LLAMA.values()) / processes
