"""Buffers that go back where an update is left out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.training.kept_buffers import KeptBuffers


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [True, False, torch.tensor(True), torch.tensor(False)])
def test_buffers_go_back_where_it_is_wanted_whatever_they_have_become(wanted):
    """Told by the host or on the device: of several shapes, layouts and dtypes, from what is no number too."""
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    buffers = [torch.randn(3), torch.randn(()), torch.arange(4), images, torch.zeros(0),
               *torch.randn(20, 7)]
    before = [buffer.clone() for buffer in buffers]
    kept = KeptBuffers(buffers)
    kept.keep()
    for buffer in buffers:
        buffer.copy_(buffer * float("nan") if buffer.is_floating_point() else buffer + 1)
    moved = [buffer.clone() for buffer in buffers]
    with Operations() as operations:
        kept.put_back(wanted)
    assert operations.count <= 8  # however many buffers there are
    for buffer, expected in zip(buffers, before if wanted else moved, strict=True):
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0, equal_nan=True)
    assert images.is_contiguous(memory_format=torch.channels_last)
