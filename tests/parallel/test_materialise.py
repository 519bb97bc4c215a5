"""From shapes to tensors, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genscale.parallel.materialise import fill, materialise, on_meta

CPU = torch.device("cpu")


def tied_pair() -> nn.Sequential:
    network = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False))
    network[2].weight = network[0].weight
    return network


def test_tensors_get_their_values_and_tied_ones_stay_tied() -> None:
    with torch.device("meta"):
        network = tied_pair()
    network[1].weight.requires_grad_(False)
    like = tied_pair()
    values = {key: torch.full(value.shape, index + 2, dtype=value.dtype)
              for index, (key, value) in enumerate(like.state_dict().items())}
    asked: list[str] = []
    assert on_meta(network)
    materialise(network, CPU)
    fill(network, lambda name: asked.append(name) or values[name])
    assert not on_meta(network)
    assert network[0].weight is network[2].weight and isinstance(network[0].weight, nn.Parameter)
    assert [p.requires_grad for p in network.parameters()] == [True, False, True]
    assert asked == [key for key in values if key != "2.weight"], "each tensor is read once"
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, values[key if key != "2.weight" else "0.weight"])


def test_what_has_its_values_keeps_them() -> None:
    network = tied_pair()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    materialise(network, CPU)
    assert network[0].weight is network[2].weight
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_buffer_that_nobody_could_fill_is_an_error() -> None:
    with torch.device("meta"):
        network = nn.Linear(2, 2)
        network.register_buffer("table", torch.ones(2), persistent=False)
    with pytest.raises(ValueError, match=r"Linear\.table: .*nothing fills it"):
        materialise(network, CPU)


def test_a_tensor_of_another_shape_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(1,\) for a tensor of shape \(2, 2\)"):
        fill(nn.Linear(2, 2), lambda name: torch.ones(1))
