"""The VAE-GAN's phases: what each minimises, and that it reaches one network alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from genscale.errors import UserError
from genscale.families.dcgan.settings import GANSettings
from genscale.families.vae.network import Encoder
from genscale.families.vae_gan.networks import FeatureDiscriminator, ImageDecoder, VAEGANSettings, networks_settings
from genscale.families.vae_gan.objective import VAEGANObjective, VAEGANObjectiveSettings
from genscale.rng import Draws

SHAPE, LATENTS = (1, 16, 16), 3
NAMES = ["encoder", "decoder", "discriminator"]


def make(**settings) -> VAEGANObjective:
    vae, judge = networks_settings(VAEGANSettings(width=4, latents=LATENTS, spectral_norm=settings.pop("spectral_norm", False)),
                                   SHAPE)
    with torch.device("meta"):
        networks = {"encoder": Encoder(vae, 16, 1), "decoder": ImageDecoder(vae, 16, 1),
                    "discriminator": FeatureDiscriminator(judge, SHAPE)}
    objective = VAEGANObjective(networks, VAEGANObjectiveSettings(**settings), SHAPE, latents=LATENTS, seed=1)
    for name, network in networks.items():
        read = objective.initial_weights(name)
        network.to_empty(device="cpu")
        network.load_state_dict({key: read(key) for key in network.state_dict()})
    return objective


def batch(count: int = 4) -> dict[str, Tensor]:
    images = torch.randint(256, (count, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"image": images, "sample": torch.arange(50, 50 + count)}


def run(objective: VAEGANObjective, name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    phase = next(phase for phase in objective.phases if phase.name == name)
    return phase.loss(objective.networks, batch, Draws(1, name, 3, batch["sample"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_phase_reaches_all_of_its_network_and_nothing_of_the_others(name):
    """The others frozen, as the trainer freezes them."""
    objective, data = make(), batch()
    (phase,) = [phase for phase in objective.phases if phase.network == name]
    for other, network in objective.networks.items():
        network.requires_grad_(other == name)
    terms = run(objective, name, data)
    minimised = {key: value for key, value in terms.items() if key not in phase.statistics}
    sum(minimised.values()).backward()
    for other, network in objective.networks.items():
        reached = {key: p.grad is not None and bool(p.grad.any()) for key, p in network.named_parameters()}
        # Blocks start as the identity: what stands before a convolution of zeros gets its first gradient a step later.
        late = {key for key in reached if any(part in key for part in ("norm1", "conv1", "norm2"))}
        assert [key for key, value in reached.items() if value != (other == name) and key not in late] == []
    for key, value in minimised.items():
        network = objective.networks[name]
        network.zero_grad()
        again = run(objective, name, data)[key]
        again.backward()
        assert any(p.grad is not None and p.grad.any() for p in network.parameters()), f"{key} is dead"
        assert torch.equal(again, value)


@torch.no_grad()
def test_the_terms_are_those_of_the_paper():
    """Equations 5 to 8, written with torch.distributions; the constant of the Gaussian is left out of the reconstruction."""
    objective, data = make(beta=2.0, reconstruction_weight=0.1), batch()
    encoder, decoder, discriminator = (objective.networks[name] for name in NAMES)
    images = data["image"] / 127.5 - 1
    mean, log_variance = encoder(images)
    posterior = Normal(mean, (log_variance / 2).exp())
    terms = {}
    for name in NAMES:
        terms[name] = {key: value.item() for key, value in run(objective, name, data).items()}
        draws = Draws(1, name, 3, data["sample"])
        made = decoder(mean + posterior.stddev * draws.normal("epsilon", LATENTS))
        from_prior = decoder(draws.normal("prior", LATENTS))
        zero = Normal(torch.tensor(0.0), 1).log_prob(torch.tensor(0.0))
        nats = -(Normal(discriminator(made)[1], 1).log_prob(discriminator(images)[1]) - zero).sum().item()
        fake = Bernoulli(logits=torch.cat([discriminator(made)[0], discriminator(from_prior)[0]]))
        if name == "encoder":
            kl = kl_divergence(posterior, Normal(torch.zeros_like(mean), 1)).sum().item()
            assert terms[name] == pytest.approx({"reconstruction": nats, "kl": 2 * kl}, rel=1e-4)
        elif name == "decoder":
            taken_for_real = -fake.log_prob(torch.ones(8)).sum().item()
            assert terms[name] == pytest.approx({"reconstruction": 0.1 * nats, "adversarial": taken_for_real}, rel=1e-4)
        else:
            real = -Bernoulli(logits=discriminator(images)[0]).log_prob(torch.ones(4)).sum().item()
            caught = -fake.log_prob(torch.zeros(8)).sum().item()
            assert [terms[name][key] for key in ("real", "fake")] == pytest.approx([real, caught], rel=1e-4)
            assert terms[name]["fake_logit"] == pytest.approx(fake.logits.sum().item() / 2, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_micro_batches_are_those_over_the_batch(name):
    objective, data = make(), batch(5)
    whole = {key: value.item() for key, value in run(objective, name, data).items()}
    parts = [run(objective, name, {key: value[part] for key, value in data.items()}) for part in (slice(0, 2), slice(2, 5))]
    assert {key: sum(part[key].item() for part in parts) for key in whole} == pytest.approx(whole, rel=1e-4, abs=1e-4)


def test_what_is_validated():
    objective = make()
    with torch.no_grad():
        totals = objective.evaluate(objective.networks, batch(80))
        again = objective.evaluate(objective.networks, {key: value[40:] for key, value in batch(80).items()})
    assert all(torch.allclose(again[key], totals[key][40:], atol=1e-5) for key in totals)  # a sample's draws are its own
    metrics = objective.summarise(totals)
    mean, _ = objective.encode(objective.networks, batch(80)["image"])
    made = objective.generate(objective.networks, mean)
    rmse = (made - batch(80)["image"] / 255).square().mean().sqrt().item()
    assert metrics["pixel_rmse"] == pytest.approx(rmse, rel=1e-5) and metrics["loss"] == metrics["fd"] > 0
    perfect = objective.summarise({**totals, "fake_features": totals["real_features"]})
    assert perfect["loss"] < 1e-6
    assert objective.summarise({**totals, "fake_features": totals["fake_features"] * torch.nan})["loss"] == torch.inf


def test_a_stage_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"model.feature_stage: 3 .* 2 stages .* nearest allowed: 2"):
        FeatureDiscriminator(GANSettings(width=4, discriminator_norm="none"), SHAPE, 3)
    with pytest.raises(UserError, match=r"data.size: 12"):
        networks_settings(VAEGANSettings(), (1, 12, 12))


def test_features_are_of_the_stage_asked_for():
    widths = []
    for stage in (1, 2, None):
        with torch.device("meta"):
            discriminator = FeatureDiscriminator(GANSettings(width=4, discriminator_norm="none"), SHAPE, stage)
        widths.append(discriminator(torch.zeros(2, *SHAPE, device="meta"))[1].shape)
    assert widths == [(2, 4 * 8 * 8), (2, 8 * 4 * 4), (2, 4 * 8 * 8)]
