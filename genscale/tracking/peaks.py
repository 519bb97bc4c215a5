"""What devices can do at most: dense matrix products, without sparsity, by the makers' data sheets."""

from __future__ import annotations

import re

import torch

# A pattern of the whole name (as torch gives it, less the maker), so that a laptop's chip, a slice of a device or an unheard-of
# successor is not taken for its namesake; then peak TFLOP/s by the arithmetic of the products. fp32 is
# fp32 proper, off the tensor cores: torch's default, which genscale does not change.
#
# Sources, all without sparsity (where a data sheet gives figures with sparsity, half of them):
#   B200              NVIDIA Blackwell data sheet (HGX B200: 36 PFLOPS bf16 and 72 PFLOPS fp8 with sparsity for 8), 2024
#   H200, H100        NVIDIA H200 and H100 data sheets, 2023-2024; PCIe and NVL are other chips than SXM ("80GB HBM3")
#   GH200             NVIDIA GH200 data sheet, 2023
#   H20               NVIDIA H20 product brief, 2023
#   A100, A30, A10    NVIDIA A100, A30, A10 data sheets, 2020-2021 (PCIe and SXM alike)
#   L40S, L40, L4     NVIDIA L40S, L40, L4 data sheets, 2022-2023
#   RTX 4090          NVIDIA Ada GPU architecture whitepaper, table 2 (fp16 and fp8 with fp32 accumulation)
#   RTX 3090          NVIDIA Ampere GA102 whitepaper, table 2 (fp16 and bf16 with fp32 accumulation)
#   V100, T4          NVIDIA V100 (SXM2; PCIe 112 and 14) and T4 data sheets; neither knows bf16
#   MI325X, MI300X    AMD Instinct MI325X and MI300X data sheets, 2023-2024
#   MI250X            AMD Instinct MI250X data sheet, 2021, half of it: the card shows itself as two devices
PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"fp8": 4500, "bf16": 2250, "fp16": 2250, "fp32": 75}),
    (r"GH200 \d+GB", {"fp8": 1979, "bf16": 989.4, "fp16": 989.4, "fp32": 67}),
    ("H200 NVL", {"fp8": 1671, "bf16": 835.5, "fp16": 835.5, "fp32": 60}),
    ("H200", {"fp8": 1979, "bf16": 989.4, "fp16": 989.4, "fp32": 67}),
    ("H100 PCIe", {"fp8": 1513, "bf16": 756.4, "fp16": 756.4, "fp32": 51}),
    ("H100 NVL", {"fp8": 1671, "bf16": 835.5, "fp16": 835.5, "fp32": 60}),
    ("H100 80GB HBM3", {"fp8": 1979, "bf16": 989.4, "fp16": 989.4, "fp32": 67}),
    ("H20", {"fp8": 296, "bf16": 148, "fp16": 148, "fp32": 44}),
    (r"A100-(SXM4|SXM|PCIE)-\d+GB|A100 80GB PCIe", {"bf16": 312, "fp16": 312, "fp32": 19.5}),
    ("A30", {"bf16": 165, "fp16": 165, "fp32": 10.3}),
    ("A10", {"bf16": 125, "fp16": 125, "fp32": 31.2}),
    ("L40S", {"fp8": 733, "bf16": 362.05, "fp16": 362.05, "fp32": 91.6}),
    ("L40", {"fp8": 362, "bf16": 181.05, "fp16": 181.05, "fp32": 90.5}),
    ("L4", {"fp8": 242.5, "bf16": 121, "fp16": 121, "fp32": 30.3}),
    ("GeForce RTX 4090", {"fp8": 330.3, "bf16": 165.2, "fp16": 165.2, "fp32": 82.6}),
    ("GeForce RTX 3090", {"bf16": 71, "fp16": 71, "fp32": 35.6}),
    (r"V100-PCIE-\d+GB", {"fp16": 112, "fp32": 14}),
    (r"V100-SXM2-\d+GB", {"fp16": 125, "fp32": 15.7}),
    ("T4", {"fp16": 65, "fp32": 8.1}),
    ("MI325X", {"fp8": 2614.9, "bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4}),
    ("MI300X", {"fp8": 2614.9, "bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4}),
    ("MI250X", {"bf16": 191.5, "fp16": 191.5, "fp32": 23.95}),
)


def device_name(device: torch.device) -> str:
    """What torch calls the device; "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(name: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s at a precision (fp32, bf16, fp16, fp8); None for what the table does not know."""
    model = re.sub(r"^(NVIDIA|Tesla|AMD Instinct) ", "", name)
    for pattern, peaks in PEAK_TFLOPS:
        if re.fullmatch(pattern, model):
            return peaks[precision] * 1e12 if precision in peaks else None
    return None
