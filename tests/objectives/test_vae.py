"""The VAE's objective against models whose likelihood is known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from genscale.families.vae.losses import VAEObjectiveSettings
from genscale.families.vae.network import VAE, VAESettings
from genscale.families.vae.objective import VAEObjective
from genscale.models.image_layers import InitialWeights
from genscale.rng import Draws

SHAPE, LATENTS, DEVIATION = (1, 4, 4), 3, 0.4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class LinearVAE(nn.Module):
    """x = W z + b + deviation x noise. The columns of W are orthogonal, so that the exact posterior is one of independent
    dimensions: the encoder's, times `off` where it is to be wrong."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        columns = torch.linalg.qr(torch.randn(16, LATENTS, generator=generator(), dtype=torch.float64)).Q
        weight = columns * torch.tensor([1.2, 0.7, 0.3], dtype=torch.float64)
        self.bias = nn.Parameter(0.1 * torch.randn(16, generator=generator(1)))
        precision = 1 + weight.square().sum(0) / DEVIATION**2
        self.weight, self.encode = nn.Parameter(weight.float()), nn.Parameter((weight / precision / DEVIATION**2).float())
        self.log_variance = nn.Parameter(-precision.log().float() + off)
        self.shift = nn.Parameter(torch.full((LATENTS,), 0.3 * off))

    def forward(self, images: Tensor | None = None, noise: Tensor | None = None, latents: Tensor | None = None):
        if latents is not None:
            return (latents @ self.weight.T + self.bias).view(-1, *SHAPE), torch.tensor(math.log(DEVIATION))
        mean = (images.flatten(1) - self.bias) @ self.encode + self.shift
        log_variance = self.log_variance.expand_as(mean)
        if noise is None:
            return mean, log_variance
        latents = mean[:, None] + (log_variance / 2).exp()[:, None] * noise
        return mean, log_variance, latents, *self(latents=latents.flatten(0, 1))

    def exact(self, pixels: Tensor) -> Tensor:
        """log p(x) of each image."""
        covariance = self.weight @ self.weight.T + DEVIATION**2 * torch.eye(16)
        return MultivariateNormal(self.bias.double(), covariance.double()).log_prob(pixels.flatten(1).double())


def linear(off: float = 0.0, **settings) -> VAEObjective:
    model = VAESettings(latents=LATENTS, likelihood="gaussian", scale="fixed", scale_value=DEVIATION)
    return VAEObjective(LinearVAE(off), model, VAEObjectiveSettings(**settings), SHAPE, seed=3)


def batch(count: int = 6, shape: tuple[int, int, int] = SHAPE) -> dict[str, Tensor]:
    images = torch.randint(60, 200, (count, *shape), generator=generator(), dtype=torch.uint8)
    return {"image": images, "sample": torch.arange(100, 100 + count)}


def terms_of(objective: VAEObjective, batch: dict[str, Tensor], step: int = 1) -> dict[str, float]:
    terms = objective.loss(objective.networks, batch, Draws(5, "vae", step, batch["sample"]))
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())
    return {name: term.item() for name, term in terms.items()}


def exact_of(objective: VAEObjective, batch: dict[str, Tensor]) -> Tensor:
    return objective.networks["vae"].exact(objective.observed(batch["image"])).detach()


def test_with_the_exact_posterior_every_weight_is_the_likelihood_itself():
    objective, data = linear(), batch()
    exact = exact_of(objective, data)
    for samples, chunk in ((1, 1), (7, 3)):
        found = objective.log_likelihood(objective.networks, data, samples, chunk=chunk)
        assert found.dtype == torch.float64 and found.shape == (6,)
        torch.testing.assert_close(found, exact, rtol=0, atol=2e-4)
    bound = terms_of(linear(importance_samples=4), data)["negative_bound"]
    assert bound == pytest.approx(-exact.sum().item(), abs=2e-3)
    many = {"image": data["image"][:1].expand(2000, -1, -1, -1), "sample": torch.arange(2000)}
    elbo = objective.evaluate(objective.networks, many)["negative_bound"]  # noisy, for its divergence is in closed form
    assert elbo.mean().item() == pytest.approx(-exact[0].item(), abs=4 * elbo.std().item() / math.sqrt(2000))


def test_with_a_wrong_posterior_the_estimate_converges_and_more_samples_give_a_tighter_bound():
    objective, data = linear(off=0.8), batch(2)
    exact = exact_of(objective, data)
    torch.testing.assert_close(objective.log_likelihood(objective.networks, data, 20_000, chunk=1000), exact, rtol=0, atol=0.03)
    many = {"image": data["image"][:1].expand(3000, -1, -1, -1), "sample": torch.arange(3000)}
    bounds = []
    for samples in (1, 5, 50):
        settings = linear(off=0.8, importance_samples=samples)
        bounds.append(-settings.evaluate(settings.networks, many)["negative_bound"].mean().item())
    assert bounds[0] + 0.05 < bounds[1] < bounds[2] - 0.05 < bounds[2] < exact[0].item() + 0.01
    assert bounds[2] == pytest.approx(exact[0].item(), abs=0.1)


def test_the_estimate_of_an_image_does_not_depend_on_the_others(monkeypatch):
    objective, data = linear(off=0.5), batch()
    monkeypatch.setattr("genscale.families.vae.objective.DECODED_PIXELS", 2 * 6 * 16)  # two samples of the six images
    decoded = []
    objective.networks["vae"].register_forward_pre_hook(
        lambda _network, _arguments, named: decoded.append(len(named.get("latents", ()))), with_kwargs=True)
    whole = objective.log_likelihood(objective.networks, data, 20, chunk=8)
    parts = [objective.log_likelihood(objective.networks, {key: value[start:start + 2] for key, value in data.items()}, 20,
                                      chunk=8) for start in (0, 2, 4)]
    assert max(decoded) == 12  # memory is bounded
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(objective.log_likelihood(objective.networks, data, 20, chunk=8, seed=9), whole)


def real(size: int = 8, likelihood: str = "bernoulli", **settings) -> VAEObjective:
    model = VAESettings(width=4, multipliers=[1, 2], latents=3, likelihood=likelihood)
    with torch.device("meta"):
        network = VAE(model, size, 1)
    objective = VAEObjective(network, model, VAEObjectiveSettings(**settings), (1, size, size), seed=3)
    network.to_empty(device="cpu")
    network.load_state_dict({name: objective.initial_weights("vae")(name) for name in network.state_dict()})
    return objective


@pytest.mark.parametrize("settings", [
    {"beta": 2.0, "kl_warmup_steps": 4, "free_bits": 0.01, "binarise": "dynamic"},
    {"importance_samples": 3, "binarise": "fixed"},
    {"capacity": 2.0, "likelihood": "logistic"},
])
def test_sums_over_micro_batches_are_those_over_the_batch(settings):
    objective, data = real(**settings), batch(6, (1, 8, 8))
    whole = terms_of(objective, data, step=2)
    parts = [terms_of(objective, {key: value[part] for key, value in data.items()}, step=2)
             for part in (slice(0, 1), slice(1, 6))]
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-5)
    assert objective.count(data) == 6
    (phase,) = objective.phases
    assert phase.statistics < set(whole) and set(whole) - phase.statistics <= {"reconstruction", "kl", "negative_bound"}


def test_the_terms_add_up_to_the_weighted_bound():
    data = batch(6, (1, 8, 8))
    plain, weighted = terms_of(real(), data), terms_of(real(beta=3.0, kl_warmup_steps=2), data)
    assert plain["kl"] == pytest.approx(plain["kl_nats"], rel=1e-6) and plain["kl"] > 0
    assert weighted["kl"] == pytest.approx(1.5 * plain["kl"], rel=1e-6)
    assert weighted["reconstruction"] == plain["reconstruction"]
    nats = plain["reconstruction"] + plain["kl"]
    name = "cross_entropy_per_dim"  # of grey levels
    assert plain[name] == weighted[name] == pytest.approx(nats / 64 / math.log(2), rel=1e-6)
    validation = real()
    found = validation.evaluate(validation.networks, data)
    assert {value.shape[0] for value in found.values()} == {6}
    metrics = validation.summarise({name: value.detach() for name, value in found.items()})
    assert metrics["loss"] == pytest.approx(metrics["reconstruction"] + metrics["kl"], rel=1e-6)
    assert metrics[name] == pytest.approx(metrics["loss"] / 64 / math.log(2), rel=1e-6)


def test_a_density_in_bits_is_one_on_the_scale_of_the_integers():
    objective, data = linear(importance_samples=4), batch()
    bits = -(exact_of(objective, data) - 16 * math.log(127.5)).sum() / 16 / math.log(2)
    assert terms_of(objective, data)["neg_log2_density_per_dim"] == pytest.approx(bits.item(), rel=1e-5)


@pytest.mark.parametrize(("settings", "grey", "per_dim", "of_image"), [
    ({"likelihood": "bernoulli"}, True, "cross_entropy_per_dim", "cross_entropy"),
    ({"likelihood": "bernoulli"}, False, "bits_per_dim", "log_likelihood"),
    ({"likelihood": "bernoulli", "binarise": "dynamic"}, True, "bits_per_dim", "log_likelihood"),
    ({"likelihood": "logistic"}, True, "bits_per_dim", "log_likelihood"),
    ({"likelihood": "gaussian"}, True, "neg_log2_density_per_dim", "log_likelihood"),
])
def test_a_number_is_called_what_it_is(settings, grey, per_dim, of_image):
    objective, data = real(**settings), batch(6, (1, 8, 8))
    if not grey:
        data["image"] = (data["image"] > 130).to(torch.uint8) * 255
    found = objective.evaluate(objective.networks, data)
    metrics = objective.summarise({name: value.detach() for name, value in found.items()})
    assert {name for name in metrics if "per_dim" in name} == {per_dim}
    measures = objective.measures_of(data["image"])
    assert (measures.per_dim, measures.of_image) == (per_dim, of_image)


def test_black_and_white_images_are_drawn_anew_or_once_for_ever():
    data = batch(4, (1, 8, 8))
    grey, other = data["image"], Draws(5, "vae", 2, data["sample"])
    draws = Draws(5, "vae", 1, data["sample"])
    dynamic, fixed = real(binarise="dynamic"), real(binarise="fixed")
    assert not torch.equal(dynamic.observed(grey, draws), dynamic.observed(grey, other))
    assert torch.equal(fixed.observed(grey, draws), fixed.observed(grey, other))
    assert torch.equal(fixed.observed(grey.flip(0)), fixed.observed(grey).flip(0))
    repeated = dynamic.evaluate(dynamic.networks, data)["negative_bound"]
    assert torch.equal(repeated, dynamic.evaluate(dynamic.networks, data)["negative_bound"])
    assert torch.equal(real().observed(grey), grey / 255)


def test_a_dimension_that_tells_images_apart_is_active():
    objective = linear()
    network = objective.networks["vae"]
    with torch.no_grad():
        network.encode[:, 2] = 0  # whatever the image, the posterior is the same
    data = [batch(20), batch(30)]
    assert objective.active_units(objective.networks, data) == 2
    totals = {name: value.detach() for name, value in objective.evaluate(objective.networks, data[1]).items()}
    assert objective.summarise(totals)["active_units"] == 2


def test_decoding_what_was_encoded_and_the_picture():
    objective = linear()
    images = batch(8)["image"]
    mean, _ = objective.encode(objective.networks, images)
    made = objective.generate(objective.networks, mean)
    assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1
    error = (made - images / 255).square().mean()
    assert error < (objective.generate(objective.networks, 0 * mean) - images / 255).square().mean()
    shown = objective.preview(objective.networks, 1, torch.device("cpu"))
    with_inputs = VAEObjective(objective.networks["vae"], VAESettings(latents=LATENTS, likelihood="gaussian", scale="fixed"),
                               VAEObjectiveSettings(), SHAPE, seed=3, examples=lambda: images)
    both = with_inputs.preview(objective.networks, 1, torch.device("cpu"))
    assert both.dtype == "uint8" and both.shape[1:] == shown.shape[1:] and both.shape[0] > shown.shape[0]
    assert (both[-60:] == shown[-60:]).all()


def test_initial_weights_are_a_function_of_the_seed():
    network = real().networks["vae"]
    again, other = InitialWeights(network, 3), InitialWeights(network, 4)
    state = network.state_dict()
    assert all(torch.equal(again(name), value) for name, value in state.items())
    assert not torch.equal(other("encoder.stem.weight"), state["encoder.stem.weight"])
