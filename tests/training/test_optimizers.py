"""Parameter groups by hand, and the updates against the formulas of the papers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genscale.families.gpt.network import GPT, GPTSettings
from genscale.parallel.torch_optimizers import join_groups
from genscale.settings.config import OptimizerSettings
from genscale.training.optimizers import make_optimizer

DECAYED = {"token_embedding.weight", "position_embedding.weight"} | {
    f"layers.{layer}.{part}.weight" for layer in range(2)
    for part in ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down")}


@pytest.fixture
def gpt() -> GPT:
    network = GPT(GPTSettings(layers=2, heads=2, width=16, positions=8), vocab_size=64)
    network.initialise(0)
    return network


def gradients(network: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()} for _ in range(steps)]


def follow(network: nn.Module, settings: OptimizerSettings, steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The weights after the optimizer was given these gradients."""
    optimizer = make_optimizer(network, settings)
    for step in steps:
        for name, parameter in network.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    return {name: parameter.detach().double() for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_matrices_and_embeddings_are_decayed_and_vectors_are_not(gpt: GPT, name: str) -> None:
    optimizer = make_optimizer(gpt, OptimizerSettings(name=name, weight_decay=0.3))
    names = {parameter: key for key, parameter in gpt.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {key: 0.3 if key in DECAYED else 0.0 for key in names.values()}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups), "a parameter stands in two groups"


def test_adamw_by_hand(gpt: GPT) -> None:
    start = {name: p.detach().double() for name, p in gpt.named_parameters()}
    lr, betas, eps, decay = 0.01, (0.8, 0.9), 1e-3, 0.3
    steps = gradients(gpt, 5)
    found = follow(gpt, OptimizerSettings(lr=lr, betas=betas, eps=eps, weight_decay=decay), steps)
    for name, weight in start.items():
        first, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for t, step in enumerate(steps, 1):
            gradient = step[name].double()
            first = betas[0] * first + (1 - betas[0]) * gradient
            second = betas[1] * second + (1 - betas[1]) * gradient**2
            update = (first / (1 - betas[0]**t)) / ((second / (1 - betas[1]**t)).sqrt() + eps)
            weight = weight - lr * (update + (decay if name in DECAYED else 0.0) * weight)
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_sgd_with_momentum_by_hand(gpt: GPT) -> None:
    start = {name: p.detach().double() for name, p in gpt.named_parameters()}
    lr, momentum, decay = 0.05, 0.9, 0.2
    steps = gradients(gpt, 4)
    found = follow(gpt, OptimizerSettings(name="sgd", lr=lr, momentum=momentum, weight_decay=decay), steps)
    for name, weight in start.items():
        velocity = torch.zeros_like(weight)
        for step in steps:
            velocity = momentum * velocity + step[name].double() + (decay if name in DECAYED else 0.0) * weight
            weight = weight - lr * velocity
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)


def test_frozen_and_all_vector_networks() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    network[0].requires_grad_(False)
    (group,) = make_optimizer(network, OptimizerSettings()).param_groups
    assert group["params"] == [network[1].weight, network[1].bias] and group["weight_decay"] == 0.0


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_groups_that_are_stepped_alike_are_one(decay: float) -> None:
    made = []
    for join in (True, False):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimizer = make_optimizer(network, OptimizerSettings(lr=0.1, weight_decay=decay))
        if join:
            join_groups(optimizer)
            assert len(optimizer.param_groups) == (2 if decay else 1)
        for _ in range(3):
            network(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(*made)


def test_a_closure_computes_what_muon_steps_by(gpt):
    """As torch's optimizers take one: its gradients count, and its loss is given back."""
    steps = gradients(gpt, 1)
    optimizer = make_optimizer(gpt, OptimizerSettings(name="muon"))
    before = gpt.layers[0].mlp.up.weight.clone()

    def closure() -> float:
        assert torch.is_grad_enabled()
        for name, parameter in gpt.named_parameters():
            parameter.grad = steps[0][name].clone()
        return 3.5

    assert optimizer.step(closure) == 3.5
    assert not torch.equal(gpt.layers[0].mlp.up.weight, before)
