"""The chunked loss against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.models.cross_entropy import _fused, _in_one_pass, _nats_and_error, summed_cross_entropy


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(301, 24, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(301, (37,), generator=generator)
    targets[[0, 5, 36]] = -1
    return hidden, weight, targets


def nats_and_gradients(chunk: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = given(dtype)
    nats = summed_cross_entropy(hidden, weight, targets, chunk)
    (nats * 0.37).backward()
    return nats.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 100])
def test_any_chunk_gives_torchs_loss_and_gradients(chunk: int) -> None:
    hidden, weight, targets = given()
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction="sum")
    (expected * 0.37).backward()
    nats, grad_hidden, grad_weight = nats_and_gradients(chunk)
    torch.testing.assert_close(nats, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_hidden, hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_weight, weight.grad, rtol=1e-5, atol=1e-5)


def test_under_autocast_and_in_bf16_it_is_as_close_to_fp32_as_the_plain_one() -> None:
    truth = nats_and_gradients(37)
    for cast in (False, True):
        def run(chunk: int, cast: bool = cast) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
                return nats_and_gradients(chunk, torch.float32 if cast else torch.bfloat16)
        for ours, plain, true in zip(run(8), run(37), truth, strict=True):
            error = (ours.float() - true).norm() / true.norm()
            assert error < max(2 * (plain.float() - true).norm() / true.norm(), 1e-3)


def test_logits_of_all_tokens_never_exist_at_once() -> None:
    hidden = torch.randn(4096, 16, requires_grad=True)
    weight = torch.randn(5000, 16, requires_grad=True)
    largest = {}
    for chunk in (4096, 128):
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            summed_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk).backward()
        largest[chunk] = max(event.cpu_memory_usage for event in profiler.events())
    assert largest[4096] >= 4096 * 5000 * 4
    assert largest[128] <= 4 * 128 * 5000 * 4


def test_the_default_holds_64_mib_of_logits_on_a_cpu() -> None:
    hidden, weight = torch.randn(700, 4, requires_grad=True), torch.randn(50_000, 4, requires_grad=True)
    targets = torch.zeros(700, dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        summed_cross_entropy(hidden, weight, targets).backward()
    assert max(event.cpu_memory_usage for event in profiler.events()) < 5 * 2**26 < 700 * 50_000 * 4 * 3


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, weight, targets = given()
    with torch.no_grad():
        assert not summed_cross_entropy(hidden, weight, targets, 8).requires_grad


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_is_given_is_the_same_loss(dtype: torch.dtype, compiled: bool) -> None:
    hidden, weight, targets = given(dtype)
    raw = (hidden @ weight.T).detach() * 5
    nats, error = _nats_and_error(raw.clone(), targets[:, None], torch.empty(raw.shape))
    fused = _fused() if compiled else _in_one_pass
    own = raw.clone()
    ours, gradient = fused(own, targets[:, None])
    torch.testing.assert_close(ours, nats, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, error, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    assert gradient.data_ptr() == own.data_ptr()  # in the logits' place
