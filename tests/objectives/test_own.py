"""A network and a loss of the user's own: sums and not means, and nothing that would make another run of it elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genscale.errors import UserError
from genscale.families.own import SimpleObjective, make_family
from genscale.models.batch_norm import BatchNorm
from genscale.rng import Draws


def loss(network, batch, draws):
    return (network(batch["x"] + draws.normal("noise", 2)) - batch["y"]).square().mean(1)


def batch(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    numbers = torch.arange(12.0)
    whole = {"x": torch.stack([numbers, -numbers], 1), "y": numbers[:, None], "sample": torch.arange(12)}
    return {name: value[rows] for name, value in whole.items()}


def draws(some: dict[str, torch.Tensor]) -> Draws:
    return Draws(1, "network", 3, some["sample"])


def test_the_loss_is_the_mean_over_all_samples_whatever_the_batches():
    torch.manual_seed(0)
    objective = SimpleObjective(nn.Linear(2, 1), loss)
    (phase,) = objective.phases
    whole = phase.loss(objective.networks, batch(), draws(batch()))["loss"]
    parts = [phase.loss(objective.networks, part, draws(part))["loss"] for part in (batch(slice(0, 5)), batch(slice(5, 12)))]
    assert torch.allclose(sum(parts), whole)
    by_hand = loss(objective.networks["network"], batch(), draws(batch())).sum()
    assert torch.equal(whole, by_hand) and phase.count(batch()) == 12
    totals = objective.evaluate(objective.networks, batch())
    assert objective.summarise({name: value.item() for name, value in totals.items()})["loss"] == pytest.approx(
        totals["loss"].item() / 12)


def test_terms_by_name_are_added_up_and_counted_by_the_user():
    def terms(network, some, draws):
        return {"near": torch.ones(len(some["x"]), 3), "far": torch.full((len(some["x"]), 3), 2.0)}

    objective = SimpleObjective(nn.Linear(2, 1), terms, count=lambda some: 3 * len(some["x"]))
    totals = objective.evaluate(objective.networks, batch())
    assert objective.summarise({name: value.item() for name, value in totals.items()}) == {"near": 1, "far": 2, "loss": 3}


@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda values: values[:, None].expand(-1, 2)])
def test_a_mean_is_refused(reduce):
    objective = SimpleObjective(nn.Linear(2, 1), lambda *words: reduce(loss(*words)))
    with pytest.raises(UserError, match="one value a sample"):
        objective.loss(objective.networks, batch(), draws(batch()))


def test_random_numbers_without_an_address_are_refused():
    objective = SimpleObjective(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.1)), loss)
    with pytest.raises(UserError, match="draws random numbers of torch .in 1."):
        objective.loss(objective.networks, batch(), draws(batch()))
    silent = SimpleObjective(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.0)), loss)
    silent.loss(silent.networks, batch(), draws(batch()))


def test_statistics_of_each_process_alone_are_refused_and_ours_begin_as_constructed():
    with pytest.raises(UserError, match="layer '0' is BatchNorm1d"):
        SimpleObjective(nn.Sequential(nn.BatchNorm1d(2)), loss)
    network = nn.Sequential(BatchNorm(2), nn.Linear(2, 1))
    objective = SimpleObjective(network, loss)
    assert objective.couples_samples
    read = objective.initial_weights("network")
    assert all(torch.equal(read(name), value) for name, value in network.state_dict().items())
    assert torch.equal(read("0.weight"), torch.ones(2)) and torch.equal(read("0.running_mean"), torch.zeros(2))


def test_data_settings_must_say_how_to_load():
    with pytest.raises(TypeError, match="inherits from LoaderSettings"):
        make_family("mine", network=lambda model: nn.Linear(2, 1), loss=loss, data=lambda *words: None, data_settings=int)
