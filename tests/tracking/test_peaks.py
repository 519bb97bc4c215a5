"""Peaks against the makers' data sheets, and names that must not be taken for another's."""

from __future__ import annotations

import pytest

from genscale.tracking.peaks import peak_flops


@pytest.mark.parametrize("name, precision, teraflops", [
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
    ("NVIDIA H100 80GB HBM3", "fp8", 1979),
    ("NVIDIA H100 PCIe", "bf16", 756.4),
    ("NVIDIA H100 NVL", "bf16", 835.5),
    ("NVIDIA H200", "bf16", 989.4),
    ("NVIDIA B200", "bf16", 2250),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312),
    ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
    ("NVIDIA L40S", "bf16", 362.05),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ("NVIDIA GeForce RTX 3090", "bf16", 71),
    ("Tesla V100-SXM2-16GB", "fp16", 125),
    ("Tesla T4", "fp16", 65),
    ("AMD Instinct MI300X", "bf16", 1307.4),
])
def test_data_sheets(name: str, precision: str, teraflops: float) -> None:
    assert peak_flops(name, precision) == teraflops * 1e12


@pytest.mark.parametrize("name, precision", [
    ("cpu", "fp32"), ("mps", "bf16"), ("NVIDIA X999", "bf16"), ("NVIDIA H1000", "bf16"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"), ("NVIDIA GeForce RTX 4090 D", "bf16"),
    ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"), ("NVIDIA A10G", "bf16"), ("NVIDIA H100", "bf16"),
    ("Tesla V100-SXM2-16GB", "bf16"), ("NVIDIA A100-SXM4-80GB", "fp8"),  # the device has no such arithmetic
])
def test_what_is_not_known_has_no_peak(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None
