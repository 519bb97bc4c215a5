"""Our BatchNorm against torch's: values, gradients and running statistics; split over processes, frozen and recomputed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.models.batch_norm import BatchNorm


def pair(channels: int = 4) -> tuple[BatchNorm, nn.BatchNorm2d]:
    ours, torchs = BatchNorm(channels), nn.BatchNorm2d(channels)
    with torch.no_grad():
        torchs.weight.copy_(torch.randn(channels))
        torchs.bias.copy_(torch.randn(channels))
        for name, tensor in ours.state_dict(keep_vars=True).items():
            tensor.copy_(torchs.state_dict()[name])
    return ours, torchs


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Halves:
    """A sum over two processes, played by two threads that each hold half of the batch."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2), {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.values[threading.get_ident()] = tensor.clone()
        self.barrier.wait(20)
        total = sum(self.values.values())
        self.barrier.wait(20)
        return total


def test_two_halves_are_normalised_as_one_batch():
    _, torchs = pair()
    images, gradient = 3 + 2 * torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    whole = images.clone().requires_grad_()
    truth = torchs(whole)
    (truth * gradient).sum().backward()
    halves, results, initial = Halves(), {}, pair()[0]
    with torch.no_grad():
        initial.weight.copy_(torchs.weight)
        initial.bias.copy_(torchs.bias)

    def work(part: int) -> None:
        layer = BatchNorm(4)
        layer.load_state_dict(initial.state_dict())
        layer.all_sum = halves
        x = images[part::2].clone().requires_grad_()
        y = layer(x)
        # Autograd's backward runs in the thread that asks for it, on the CPU.
        (y * gradient[part::2]).sum().backward()
        results[part] = (layer, x, y)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for part, (layer, x, y) in results.items():
        torch.testing.assert_close(y, truth[part::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, whole.grad[part::2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_mean, torchs.running_mean)
        torch.testing.assert_close(layer.running_var, torchs.running_var)
    for name in ("weight", "bias"):  # the engine adds them up
        total = sum(getattr(layer, name).grad for layer, _, _ in results.values())
        torch.testing.assert_close(total, getattr(torchs, name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_running_statistics_stand_still_when_frozen_or_recomputed(spread, recomputed):
    ours, torchs = pair()
    ours.may_be_recomputed = recomputed
    if spread:
        ours.all_sum = torch.clone
    x = torch.randn(3, 4, 2, 2)
    before = ours.running_mean.clone()
    ours.is_trained = False
    frozen = ours(x)
    ours.is_trained = True
    ours.is_recomputed = recomputed
    again = ours(x) if recomputed else frozen
    ours.is_recomputed = False
    assert torch.equal(ours.running_mean, before)
    trained = ours(x)
    torch.testing.assert_close(trained, torchs(x))
    assert torch.equal(trained, frozen) and torch.equal(trained, again)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_one_process_copies_nothing():
    """And has the bits of torch's layer, in training and frozen."""
    ours, torchs = pair()
    x, gradient = torch.randn(2, 6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    for trained, images in zip((True, False), x, strict=True):
        ours.is_trained = trained
        found, expected = images.clone().requires_grad_(), images.clone().requires_grad_()
        with Operations() as operations:
            (ours(found) * gradient).sum().backward()
        (torchs(expected) * gradient).sum().backward()
        assert operations.names & {"clone", "copy_"} == set() and "native_batch_norm" in operations.names
        assert torch.equal(found.grad, expected.grad)
        assert torch.equal(ours.running_mean, torchs.running_mean) == trained
        assert torch.equal(ours.running_var, torchs.running_var) == trained


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))
