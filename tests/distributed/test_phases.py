"""The phase contract under every strategy, against plain PyTorch in one process: global normalisation, frozen opponents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genscale.rng import Draws
from genscale.testing.objectives import NOISE, ToyGAN

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
LR = 0.1


@pytest.fixture(scope="module")
def results(engines):
    # Reading every weight between the phases makes FSDP2 drop what it gathered, calling a network makes it keep that: the
    # training must not depend on either.
    common = {"ragged": True, "accumulation": 2, "steps": 5, "optimizer": {"name": "sgd", "lr": LR, "weight_decay": 0.0}}
    kinds = {"text": {"task": "text"}, "points": {"task": "points"}, "points watched": {"task": "points", "watch": True},
             "points evaluated": {"task": "points", "evaluate": True}}
    return engines({f"{kind} {strategy}": {**settings, **common, "strategy": strategy}
                    for kind, settings in kinds.items() for strategy in STRATEGIES})


def sgd_step(network):
    with torch.no_grad():
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item()
        for parameter in network.parameters():
            parameter -= LR * parameter.grad
            parameter.grad = None
    return norm


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_are_normalised_by_the_global_count_of_valid_tokens(strategy, results, worker, difference):
    """Ranks and micro-batches have from 1 to 25 valid targets a sample: a mean of means would be another loss."""
    network, losses, norms = worker.text_network(), [], []
    for step in range(5):
        tokens = worker.token_batch(step, ragged=True)
        logits = network(tokens[:, :-1].clamp(min=0))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1)
        loss.backward()
        losses.append(loss.item())
        norms.append(sgd_step(network))
    steps = results[f"text {strategy}"]["steps"]
    assert difference([step["loss"] for step in steps], losses) < 1e-5
    assert difference([step["grad_norm"] for step in steps], norms) < 1e-4


@pytest.fixture(scope="module")
def truth(worker):
    """Per step (discriminator loss, generator loss) of the two networks trained by hand, and their final weights."""
    networks = ToyGAN(width=64).networks
    generator, discriminator = networks["generator"], networks["discriminator"]
    steps = []
    for step in range(5):
        points, samples = worker.point_batch(step), torch.arange(worker.GLOBAL_BATCH)
        noise = {phase: Draws(1337, phase, step, samples).normal("noise", NOISE) for phase in ("discriminate", "generate")}
        fake = discriminator(generator(noise["discriminate"]).detach())
        first = (F.softplus(-discriminator(points)) + F.softplus(fake)).mean()
        first.backward()
        sgd_step(discriminator)
        second = F.softplus(-discriminator(generator(noise["generate"]))).mean()
        second.backward()
        discriminator.zero_grad()
        sgd_step(generator)
        steps.append((first.item(), second.item()))
    return steps, {name: dict(network.named_parameters()) for name, network in networks.items()}


@pytest.mark.parametrize("kind", ["points", "points watched", "points evaluated"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_networks_train_as_in_plain_pytorch(strategy, kind, results, truth, difference):
    found, (steps, weights) = results[f"{kind} {strategy}"], truth
    for index, phase in enumerate(("discriminate", "generate")):
        assert difference([step[f"{phase}/loss"] for step in found["steps"]], [step[index] for step in steps]) < 1e-5
    for name, parameters in weights.items():
        for key, parameter in parameters.items():
            torch.testing.assert_close(found["weights"][name][key], parameter.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_phase_touches_the_network_it_does_not_train(strategy, results):
    """Weights bit-identical across the other network's phase, and no gradient left in it."""
    assert results[f"points watched {strategy}"]["leaks"] == []
