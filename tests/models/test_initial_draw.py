"""Layers that the families do not use: drawn by their own `reset_parameters`, or refused by name; never zeros in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from genscale.errors import UserError
from genscale.models.image_layers import InitialWeights, spectral_norm
from genscale.models.initial_draw import HasInitialScale, ResetsParameters, scale_initial
from genscale.rng import torch_generator


class Codebook(nn.Module):
    """A parameter, a constant and a counter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(6, 4))
        self.register_buffer("mask", torch.empty(3, 3, dtype=torch.bool))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.inner = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.codes, std=0.1)
        self.mask = torch.ones(3, 3, dtype=torch.bool).tril()
        self.steps.fill_(7)
        self.inner.bias.data.fill_(9)  # not its own: no harm, no effect


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def drawn(build: Callable[[], nn.Module], seed: int = 0) -> dict[str, Tensor]:
    network = on_meta(build)
    read = InitialWeights(network, seed)
    return {name: read(name) for name in network.state_dict()}


TORCHS = [
    lambda: nn.Conv1d(3, 8, 5), lambda: nn.ConvTranspose1d(3, 8, 5), lambda: nn.Conv3d(2, 4, 3), lambda: nn.Bilinear(4, 5, 6),
    lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=2), lambda: nn.GRUCell(4, 6), lambda: nn.PReLU(3),
    lambda: nn.EmbeddingBag(5, 3), lambda: nn.BatchNorm1d(4), lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4),
]  # fmt: skip


@pytest.mark.parametrize("build", TORCHS, ids=lambda build: type(build()).__name__)
def test_torchs_layers_are_drawn_by_torchs_own_rule(build) -> None:
    """The very numbers of `reset_parameters` from the layer's address, whatever torch has drawn before."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    network = drawn(lambda: nn.Sequential(nn.Identity(), build()), seed=5)
    assert torch.equal(torch.get_rng_state(), state), "the program's own random numbers go on as if nothing had been"
    true = build()
    torch.manual_seed(torch_generator(5, "weights", "1").initial_seed())
    true.reset_parameters()
    assert network.keys() == {f"1.{name}" for name in true.state_dict()}
    for name, value in true.state_dict().items():
        found = network[f"1.{name}"]
        assert torch.equal(found, value) and found.dtype == value.dtype, name
    again = drawn(lambda: nn.Sequential(nn.Identity(), build()), seed=5)
    assert all(torch.equal(network[name], value) for name, value in again.items())


def test_attention_is_drawn_and_its_output_is_a_linear_layer() -> None:
    found = drawn(lambda: nn.MultiheadAttention(16, 2, add_bias_kv=True))
    bound = (6 / (16 + 48)) ** 0.5  # Glorot and Bengio 2010, of the matrix as it stands
    weight = found["in_proj_weight"]
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not found["in_proj_bias"].any() and found["bias_k"].any() and found["out_proj.weight"].any()


def test_a_layer_draws_its_own_tensors_and_whole_numbers_stay_whole() -> None:
    found = drawn(Codebook)
    assert found["codes"].std() == pytest.approx(0.1, rel=0.5)
    assert torch.equal(found["mask"], torch.ones(3, 3).tril().bool()) and found["mask"].dtype == torch.bool
    assert found["steps"].item() == 7 and found["steps"].dtype == torch.int64
    assert not found["inner.bias"].any()
    assert not torch.equal(found["codes"], drawn(Codebook, seed=1)["codes"])


def test_a_network_that_has_its_weights_already_is_not_touched_by_a_read() -> None:
    network = Codebook()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    read = InitialWeights(network, 0)
    assert read("codes").any()
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in network.state_dict().items())


class Adapted(nn.Linear):
    """A linear layer with two more matrices (LoRA), and nothing that says what they begin as."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.empty(2, 4)), nn.Parameter(torch.empty(4, 2))


class OwnLinear(Adapted):
    def reset_parameters(self) -> None:
        if hasattr(self, "up"):  # not yet where nn.Linear's constructor calls it
            for parameter in (self.weight, self.bias, self.down):
                nn.init.ones_(parameter)
            nn.init.zeros_(self.up)


class Forgetful(Codebook):
    def reset_parameters(self) -> None:
        self.steps.fill_(0)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(8, 4))


LEFT = "reset_parameters leaves it without a value"
REFUSED = [
    (lambda: nn.Sequential(Positions()), r"layer 0 \(Positions\), tensor table \(8, 4\): nobody knows.*reset_parameters\(self"),
    (Positions, r"layer of the network itself \(Positions\), tensor table \(8, 4\)"),
    (lambda: nn.Sequential(Adapted()), rf"layer 0 \(Adapted\), tensor down \(2, 4\): {LEFT}"),
    (lambda: nn.Sequential(Forgetful()), rf"layer 0 \(Forgetful\), tensor codes \(6, 4\): {LEFT}"),
    (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), r"layer parametrizations.weight .*tensor original0.*plain layer"),
]


@pytest.mark.parametrize("build, words", REFUSED)
def test_what_nobody_can_draw_is_refused_by_name(build, words) -> None:
    with pytest.raises(UserError, match=words):
        drawn(build)


def test_a_draw_of_ones_own_goes_before_the_usual_one() -> None:
    found = drawn(lambda: nn.Sequential(OwnLinear()))
    assert bool((found["0.weight"] == 1).all()) and not found["0.up"].any()


def test_the_weight_inside_a_spectral_norm_is_drawn_too() -> None:
    found = drawn(lambda: nn.Sequential(spectral_norm(nn.Conv1d(3, 8, 5))))
    weight = found["0.parametrizations.weight.original"]
    largest = found["0.parametrizations.weight.0.u"] @ weight.flatten(1) @ found["0.parametrizations.weight.0.v"]
    assert largest.item() == pytest.approx(torch.linalg.svdvals(weight.flatten(1))[0].item(), rel=0.05)


def test_the_families_layers_are_drawn_as_ever() -> None:
    """By the formula, from the address: runs of earlier versions began with these numbers."""
    conv, transposed = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(4, 6, 4, 2)
    linear = scale_initial(scale_initial(nn.Linear(4, 6), gain=2.0), bias=0.3)
    found = drawn(lambda: nn.Sequential(conv, transposed, linear, nn.Embedding(5, 3), nn.GroupNorm(2, 4)), seed=3)
    scales = {"0.weight": 27**-0.5, "1.weight": (4 * 16 / 4) ** -0.5, "2.weight": 2 * 4**-0.5, "2.bias": 0.3, "3.weight": 1.0}
    for name, scale in scales.items():
        normal = torch.randn(found[name].shape, generator=torch_generator(3, "weights", name))
        assert torch.equal(found[name], normal * scale), name
    assert not found["0.bias"].any() and bool((found["4.weight"] == 1).all()) and not found["4.bias"].any()


def test_what_a_layer_declares_is_told_by_its_type() -> None:
    plain, scaled = nn.Linear(2, 2), scale_initial(nn.Linear(2, 2), gain=0.0)
    assert isinstance(scaled, HasInitialScale) and not isinstance(plain, HasInitialScale)
    assert isinstance(Codebook(), ResetsParameters) and not isinstance(Positions(), ResetsParameters)
