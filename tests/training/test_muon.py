"""Muon against torch's own, against the singular value decomposition, and what it is given to train."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.settings.config import OptimizerSettings
from genscale.training.muon import orthogonal
from genscale.training.optimizers import make_optimizer

SETTINGS = OptimizerSettings(name="muon", lr=0.01, weight_decay=0.3, muon_momentum=0.9)
SHAPE = GPTSettings(layers=2, heads=4, kv_heads=2, width=32, positions=8, preset="qwen3")


@pytest.fixture
def gpt() -> GPT:
    network = GPT(SHAPE, vocab_size=64)
    network.initialise(0)
    return network


def give_gradients(network: nn.Module, step: int) -> None:
    for index, parameter in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_hidden_matrices_follow_torchs_muon_and_the_rest_adamw(gpt: GPT) -> None:
    """torch's Muon computes in bf16, and knows of no matrix made of three: it gets query, key and value one by one."""
    twin = GPT(SHAPE, vocab_size=64)
    twin.initialise(0)
    ours = make_optimizer(gpt, SETTINGS, precision="bf16")
    parts, rest, expected = {}, [], dict(twin.named_parameters())
    for name, parameter in twin.named_parameters():
        if not name.startswith("layers.") or parameter.ndim < 2:
            rest.append(parameter)
            continue
        rows = (32, 16, 16) if "query_key_value" in name else (len(parameter),)
        parts[name] = [nn.Parameter(part.detach().clone()) for part in parameter.split(rows)]
    theirs = torch.optim.Muon([part for each in parts.values() for part in each], lr=0.01, weight_decay=0.3, momentum=0.9,
                              adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.3},
                               {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        give_gradients(gpt, step)
        give_gradients(twin, step)
        for name, each in parts.items():
            for part, gradient in zip(each, expected[name].grad.split([len(part) for part in each]), strict=True):
                part.grad = gradient
        for optimizer in (ours, theirs, adamw):
            optimizer.step()
    for name, parameter in gpt.named_parameters():
        wanted = torch.cat(list(parts[name])) if name in parts else expected[name]
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)
    assert len(parts) == 2 * 5


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_an_orthogonal_matrix_has_the_singular_vectors_of_its_origin(shape: tuple[int, int]) -> None:
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix = left @ torch.diag(values.clamp(min=values.max() / 10)) @ right
    made = left.T @ orthogonal(matrix, torch.float32) @ right.T
    assert (made - torch.diag(made.diagonal())).abs().max() < 1e-4
    assert 0.6 < made.diagonal().min() <= made.diagonal().max() < 1.25


def test_one_learning_rate_moves_all_groups_and_reaches_adamw(gpt: GPT) -> None:
    optimizer = make_optimizer(gpt, SETTINGS)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    give_gradients(gpt, 0)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in gpt.named_parameters())


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name: muon .* Linear has none; use adamw"):
        make_optimizer(nn.Linear(4, 4), SETTINGS)


def test_a_run_with_muon_resumes_bit_for_bit(genscale, tiny_config, tiny_run) -> None:
    settings = ("train", "--config", tiny_config, "--optimizer.name", "muon", "--train.checkpoint_every", 3)
    assert genscale(*settings).code == 0
    last = tiny_run / "checkpoints" / "step-00000006"
    digest = genscale("checkpoint", "digest", last).out
    shutil.rmtree(last)
    assert genscale(*settings).code == 0
    assert "continuing from" in (tiny_run / "logs" / "rank-00000.log").read_text()
    assert genscale("checkpoint", "digest", last).out == digest
