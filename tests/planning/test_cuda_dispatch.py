"""A step that is planned for a GPU keeps what CUDA's autocast and kernels keep: against closed forms of the bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import genscale
from genscale.families import FAMILIES
from genscale.planning import cuda_dispatch
from genscale.planning.account import Machine
from genscale.planning.trace import plan_step
from genscale.settings.parser import parse_config

BATCH, SIZE, CHANNELS, GROUPS = 4, 16, 32, 8


class NormalisedConvolution(nn.Module):
    """What networks of images repeat: group normalisation, SiLU, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.convolution = nn.GroupNorm(GROUPS, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(F.silu(self.norm(x)))


def activations(config, kind: str, gpus: int = 1) -> int:
    parts = plan_step(config, Machine(kind, gpus, gpus)).memory.parts
    return sum(part.bytes for part in parts if part.category == "activations")


def convolutions(monkeypatch, blocks: int, kind: str) -> int:
    family = genscale.make_family(
        "stack", network=lambda model: nn.Sequential(*(NormalisedConvolution() for _ in range(blocks))),
        loss=lambda network, batch, draws: network(batch["image"]).float().sum((1, 2, 3)), data=lambda settings, seed: None,
        sample=lambda settings: {"image": torch.empty(CHANNELS, SIZE, SIZE, device="meta")})
    monkeypatch.setitem(FAMILIES.registered, "stack", family)
    return activations(parse_config(FAMILIES, ["--model.family=stack", f"--train.global_batch_size={BATCH}",
                                               "--train.precision=bf16"]), kind)


def test_a_block_of_group_normalisation_keeps_what_autocast_on_cuda_has_it_keep(monkeypatch):
    """Its input as fp32, the normalised values as fp32 (for SiLU), the convolution's input and weights as bf16; the CPU's
    autocast leaves all three in bf16."""
    values, weights = BATCH * CHANNELS * SIZE**2, CHANNELS * CHANNELS * 9 + CHANNELS
    statistics = 2 * BATCH * GROUPS
    kept = {"h100": values * (4 + 4 + 2) + 2 * weights + 4 * statistics,
            "cpu": values * (2 + 2 + 2) + 2 * weights + 4 * statistics}
    for kind, expected in kept.items():
        three, four = (convolutions(monkeypatch, blocks, kind) for blocks in (3, 4))
        assert four - three == pytest.approx(expected, rel=1e-3), kind


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_block_of_a_gpt_keeps_what_autocast_on_cuda_has_it_keep(norm):
    """Under DDP in bf16: the stream and what is normalised as fp32, every product's input as bf16, and of every matrix a copy
    in bf16, until its backward. RMS normalisation is one kernel, which keeps its input and a number a row."""
    width, heads, batch, time = 64, 4, 2, 128

    def gpt(layers: int) -> int:
        flags = [f"--{each}" for each in (
            "model.family=gpt", f"model.layers={layers}", f"model.width={width}", f"model.heads={heads}", f"model.norm={norm}",
            "model.vocab_size=512", "model.bias=false", f"model.positions={time}", f"data.sequence_length={time}",
            "data.tokenizer=not/here", f"train.global_batch_size={2 * batch}", "parallel.strategy=ddp", "train.precision=bf16")]
        return activations(parse_config(FAMILIES, flags), "h100", gpus=2)

    # Of a value of the stream: both norms' inputs in fp32; in bf16 their results, query, key and value, what attention gives,
    # and of the MLP, four times as wide, what goes into GELU and what comes out.
    values = 2 * 4 + 2 * (2 + 3 + 1 + 4 + 4)
    # Of a row: of each norm mean and deviation, or one of them; of attention, a number a head.
    rows = 2 * 4 * (2 if norm == "layernorm" else 1) + 4 * heads
    expected = batch * time * (width * values + rows) + 2 * 12 * width**2
    assert gpt(4) - gpt(3) == pytest.approx(expected, rel=1e-3)


def test_operations_are_cast_as_the_header_of_torch_has_it():
    text = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists = {name: set(re.findall(r" _\((\w+)", body))
             for name, body in re.findall(r"#define AT_FORALL_(\w+)\(_\)(.*?)\n\n", text, re.DOTALL)}
    cuda, cpu = (set(torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{kind}")) for kind in ("CUDA", "CPU"))
    ours = {name.removeprefix("aten::").partition(".")[0] for name in cuda - cpu}
    assert lists["FP32_SET_OPT_DTYPE"] & ours == cuda_dispatch.RESULT
    assert lists["PROMOTE"] & ours == cuda_dispatch.WIDEST
    # Registered beside the lists, with the first; the last in builds with CUDA.
    of_cudnn = {"cudnn_convolution", "cudnn_convolution_transpose", "_cudnn_rnn"}
    assert (lists["LOWER_PRECISION_FP"] | of_cudnn) & ours == cuda_dispatch.LOWER & ours
    rest = ours - cuda_dispatch.RESULT - cuda_dispatch.WIDEST - cuda_dispatch.LOWER
    assert rest == (lists["FP32"] | {"norm"}) & ours and {"group_norm", "upsample_nearest2d"} < rest
    with cuda_dispatch.as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(2, 4, 4, 4, dtype=torch.bfloat16)
        results = [F.interpolate(x, scale_factor=2), x.softmax(1), torch.addcmul(x, x, x), F.pad(x, (1, 1, 1, 1), "reflect"),
                   F.conv2d(x.float(), x[:, :, :1, :1]), x.sum(1, dtype=torch.bfloat16)]
    lower, whole = torch.bfloat16, torch.float32
    assert [result.dtype for result in results] == [whole, whole, lower, lower, lower, lower]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.interpolate(x, scale_factor=2).dtype == lower  # as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_normalisation_on_cuda_brings_channels_last_into_order(dtype):
    """It keeps that copy; `benchmarks/without_gpu.py` compares all that is planned with what CUDA's dispatch does."""
    x = torch.randn(2, 8, 4, 4, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(8, dtype=dtype), torch.randn(8, dtype=dtype)
    plain = F.group_norm(x, 4, weight, bias)
    with cuda_dispatch.as_on_cuda():
        normal = F.group_norm(x, 4, weight, bias)
    assert normal.is_contiguous() and plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normal, plain)
    assert normal.grad_fn._saved_input.data_ptr() != x.data_ptr() and normal.grad_fn._saved_input.is_contiguous()
    assert F.group_norm(x, 4, weight, bias).is_contiguous(memory_format=torch.channels_last)  # as it was
