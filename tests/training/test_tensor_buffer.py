"""Host memory in which tensors wait to be written: in blocks, of which one tensor may fill several."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from genscale.checkpoint import tensor_files
from genscale.checkpoint.tensor_files import TensorBuffer
from genscale.parallel.pieces import Piece


def pieces(tensors: dict[str, torch.Tensor]) -> list[Piece]:
    return [Piece(name, tuple(tensor.shape), 0, tensor) for name, tensor in tensors.items()]


@pytest.mark.parametrize("block", [64, 100, 2**26])
def test_what_lies_in_several_blocks_is_written_as_one_file(block, monkeypatch, tmp_path):
    monkeypatch.setattr(tensor_files, "BLOCK", block)
    buffer = TensorBuffer()
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    small = {"weight": torch.randn(7, 5), "count": torch.tensor(3), "half": torch.randn(9).bfloat16()}
    for number, tensors in enumerate((small, {**small, "images": images, "empty": torch.empty(0)}, small)):  # grows, then less
        buffer.take(pieces(tensors))
        said = buffer.write(tmp_path / f"{number}.safetensors")
        found = load_file(tmp_path / f"{number}.safetensors")
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert said["bytes"] == (tmp_path / f"{number}.safetensors").stat().st_size
    held = sum(len(memory) for memory in buffer._memory)
    assert held == sum(tensor.nbytes for tensor in (*small.values(), images))  # no more than the largest took
