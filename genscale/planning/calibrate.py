"""A machine's own profile, measured in about a minute: products, attention, elementwise work, collectives, the disk.

What is measured are the pieces that the clock of a plan is made of (`genscale.planning.time`), at the sizes of the model that
is planned where one is given; the share of an exchange that a step waits for is none of them, and stays assumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from genscale.parallel.processes import Processes
from genscale.planning.account import Operation, PlannedStep
from genscale.planning.measure import all_reduce_seconds, product_seconds, undisturbed
from genscale.planning.profiles import GpuProfile, as_dict, profile, profile_names
from genscale.planning.time import CAUSAL, PRECISIONS, attention_share, product_share
from genscale.tracking.peaks import device_name, peak_flops
from genscale.writing import write_seconds, write_whole

GPU_BYTES, CPU_BYTES = 256 * 2**20, 16 * 2**20
"""Of an all-reduce, as the doctor's."""
DISK_BYTES = 64 * 2**20
PRODUCTS = {"cuda": [(8192, 8192, 8192), (8192, 4096, 4096), (8192, 1024, 1024), (16384, 768, 768), (768, 768, 16384)],
            "cpu": [(512, 512, 512), (1024, 256, 256), (1024, 128, 128), (256, 1024, 256), (128, 128, 1024), (1024, 64, 64)]}
"""Rows, columns and inner size, where no model is given."""
ATTENTION = {"cuda": [(4, 16, 2048, 2048, 128), (16, 12, 1024, 1024, 64)], "cpu": [(4, 4, 256, 256, 32), (2, 4, 128, 128, 32)]}
CONVOLUTION = (16, 64, 64, 32, 32, 3, 3)
WIDTHS = {"cuda": (8192, 4096), "cpu": (1024, 256)}
"""Rows and columns of what elementwise operations are measured on."""
CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MOST_SHAPES = 12
SECONDS = 40.0
"""For all measurements of one device together, without collectives and disk."""
SPREAD = {"cpu": 0.35, "cuda": 0.2}
"""Of plans on a machine that was measured: `benchmarks/results/plan-cpu.json` has a CPU's errors, beside other people's
work; no GPU has been judged."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """What the products of a device come to.

    Attributes:
        large: FLOP/s of a very large one.
        half: inner size at which half of it is reached.
    """

    large: float
    half: float


def calibrate(processes: Processes, hosts: Sequence[str], folder: Path, precision: str = "fp32",
              step: PlannedStep | None = None, seconds: float = SECONDS) -> GpuProfile:
    """The profile of the machine that this process runs on. Called by every process of a group; all get the slowest's.

    Args:
        hosts: nodes of all ranks, in their order.
        folder: on the disk that checkpoints will be written to.
        precision: that the run computes in.
        step: of the model that will be planned: its sizes are measured; None: usual ones.
        seconds: for the measurements of one device.

    Raises:
        OSError: the folder takes no file from one of them.
    """
    device = processes.device
    disk = _disk(processes, folder)
    found = _measured_device(device, precision, step, seconds)
    all_found = processes.gather(found)
    slowest = min(all_found, key=lambda each: each.peak(precision if precision != "fp8" else "bf16") * each.product)
    links = _collectives(processes, hosts, slowest)
    return replace(slowest, **links, disk=disk, gpus_per_node=max(hosts.count(host) for host in {*hosts}))


def _disk(processes: Processes, folder: Path) -> float:
    """Bytes a second of the slowest process. Raises OSError on every process where one cannot write."""
    trouble: OSError | None = None
    try:
        rate = DISK_BYTES / write_seconds(folder, DISK_BYTES, "calibration")
    except OSError as error:
        rate, trouble = 0.0, error
    found = processes.gather((rate, trouble))
    for _, others in found:
        if others is not None:
            raise others
    return min(rate for rate, _ in found)


def write_profile(machine: GpuProfile, path: Path) -> None:
    """A file for `--gpu NAME=path`. Raises OSError."""
    write_whole(path, json.dumps(as_dict(machine), indent=1) + "\n")


def _measured_device(device: torch.device, precision: str, step: PlannedStep | None, seconds: float) -> GpuProfile:
    base, dtype = _base(device), DTYPES[precision]
    operations = step.operations if step is not None else ()
    share = seconds / 4
    rates = _products(device, dtype, _shapes(operations, "product") or PRODUCTS[device.type], base, share)
    arithmetic = PRECISIONS[str(dtype).removeprefix("torch.")]
    known = peak_flops(base.device, arithmetic)
    peak = known or rates.large
    measured = replace(base, product=min(1.0, rates.large / peak), half=rates.half, peaks={} if known else {arithmetic: peak})
    attention = _attention(device, dtype, _shapes(operations, "attention") or ATTENTION[device.type], base, share)
    convolution = _convolution(device, dtype, _shapes(operations, "convolution") or [CONVOLUTION], measured, peak, share / 2)
    copied, moved = _traffic(device, dtype, _width(operations, device), share)
    bandwidth = copied if device.type == "cpu" else base.memory_bandwidth
    return replace(measured, attention=min(1.0, attention / peak), convolution=convolution, memory_bandwidth=bandwidth,
                   memory=min(1.0, moved / bandwidth), launch=_launch(device), spread=SPREAD[device.type],
                   origin=f"measured on {base.device}, {precision}; exposed is assumed")


def _base(device: torch.device) -> GpuProfile:
    """What is known of the device without measuring: its data sheet, and what torch says of it."""
    name = device_name(device)
    shipped = [profile(each) for each in profile_names()]
    like = next((each for each in shipped if each.device == name), None)
    if device.type == "cpu":
        cpu = profile("cpu")
        return replace(cpu, memory_bytes=psutil.virtual_memory().total, multiprocessors=torch.get_num_threads(),
                       source="measured")
    properties = torch.cuda.get_device_properties(device)
    known = like or replace(profile("h100"), device=name, source="as h100, which it may not be")
    return replace(known, memory_bytes=properties.total_memory, multiprocessors=properties.multi_processor_count)


def _shapes(operations: Iterable[Operation], kind: str) -> list[tuple[int, ...]]:
    """Those that a model's step spends most on."""
    spent: dict[tuple[int, ...], float] = {}
    for operation in operations:
        if operation.kind == kind:
            spent[operation.shape] = spent.get(operation.shape, 0.0) + operation.flops * operation.count
    return sorted(spent, key=lambda shape: -spent[shape])[:MOST_SHAPES]


def _width(operations: Iterable[Operation], device: torch.device) -> tuple[int, int]:
    """Rows and columns of the elementwise results that a model's step moves most bytes for."""
    moved: dict[tuple[int, ...], float] = {}
    for operation in operations:
        if operation.kind == "elementwise" and operation.part == "forward" and len(operation.shape) > 1:
            moved[operation.shape] = moved.get(operation.shape, 0.0) + operation.bytes * operation.count
    if not moved:
        return WIDTHS[device.type]
    shape = max(moved, key=lambda each: moved[each])
    return int(np.prod(shape[:-1])), shape[-1]


def _products(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], base: GpuProfile,
              seconds: float) -> Rates:
    """By the half size with which the products of all shapes come out most alike."""
    measured = []
    for shape in shapes:
        *batch, rows, columns, inner = shape
        left = torch.randn(*batch, rows, inner, device=device, dtype=dtype)
        right = torch.randn(*batch, inner, columns, device=device, dtype=dtype)
        rate = 2 * float(np.prod(shape)) / product_seconds(left, right, seconds / len(shapes))
        measured.append(((int(np.prod(batch)), rows, columns, inner), rate))

    def logs(half: float) -> np.ndarray:
        like = replace(base, half=half)
        return np.array([np.log(rate / product_share(*shape, like)) for shape, rate in measured])

    half = min(np.linspace(0, 1500, 301), key=lambda each: float(np.abs(logs(each) - np.median(logs(each))).mean()))
    return Rates(float(np.exp(np.median(logs(half)))), float(half))


def _attention(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], base: GpuProfile,
               seconds: float) -> float:
    """FLOP/s over long texts, forward and backward."""
    rates = []
    for shape in shapes[:3]:
        batch, heads, queries, keys, width = shape
        query, key, value = (torch.randn(batch, heads, time, width, device=device, dtype=dtype, requires_grad=True)
                             for time in (queries, keys, keys))
        causal = queries == keys
        gradient = torch.ones_like(query)

        def both(q: Tensor = query, k: Tensor = key, v: Tensor = value, g: Tensor = gradient, causal: bool = causal) -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal), (q, k, v), g)

        flops = 3.5 * 4 * CAUSAL * batch * heads * queries * keys * width
        rates.append(flops / undisturbed(query, both, seconds / len(shapes[:3])) / attention_share(shape, base))
    return median(rates)


def _convolution(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], base: GpuProfile, peak: float,
                 seconds: float) -> float:
    """How convolutions do by products of the same size."""
    shares = []
    for shape in shapes[:4]:
        batch, into, out, *rest = shape
        size, kernel = rest[:len(rest) // 2], rest[len(rest) // 2:]
        image = torch.randn(batch, into, *size, device=device, dtype=dtype)
        weight = torch.randn(out, into, *kernel, device=device, dtype=dtype)
        convolve = partial(CONVOLVE[len(size)], image, weight, padding="same")
        inner = into * int(np.prod(kernel))
        taken = undisturbed(image, convolve, seconds / len(shapes[:4]))
        flops = 2 * batch * float(np.prod(size)) * out * inner
        shares.append(flops / taken / (peak * base.product * product_share(1, batch * int(np.prod(size)), out, inner, base)))
    return median(shares)


def _traffic(device: torch.device, dtype: torch.dtype, size: tuple[int, int], seconds: float) -> tuple[float, float]:
    """Bytes a second of a copy, and of the elementwise operations of a network, forward and backward."""
    x = torch.randn(*size, device=device, dtype=dtype)
    gradient, weight = torch.randn_like(x), torch.ones(size[1], device=device, dtype=dtype)
    leaf = x.clone().requires_grad_()
    each = x.numel() * x.element_size()
    works: list[tuple[int, Callable[[], Any]]] = [
        (3, lambda: x + gradient), (2, lambda: F.gelu(x, approximate="tanh")),
        (2, lambda: F.layer_norm(x, size[1:], weight)),
        (7, lambda: torch.autograd.grad(F.layer_norm(leaf, size[1:], weight), leaf, gradient)),
        (5, lambda: torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, gradient))]
    spent = [undisturbed(x, work, seconds / 6) for _, work in works]
    copied = 2 * each / undisturbed(x, lambda: gradient.copy_(x), seconds / 6)
    moved = each * sum(times for times, _ in works) / sum(spent)
    return max(copied, moved), moved


def _launch(device: torch.device) -> float:
    """Seconds of the host for one operation of a network, forward and backward together."""
    x = torch.ones(1, device=device, requires_grad=True)
    chain = 50

    def both() -> None:
        y = x
        for _ in range(chain):
            y = y * 1.5
        y.backward()

    return undisturbed(x, both, 0.5) / (2 * chain)


def _collectives(processes: Processes, hosts: Sequence[str], base: GpuProfile) -> dict[str, Any]:
    """Links inside and between nodes, as the all-reduces over them come out; nothing of what is not there."""
    found: dict[str, Any] = {}
    if processes.world_size == 1:
        return found
    device, own = processes.device, hosts[processes.rank]
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    tensor, small = torch.zeros(size // 4, device=device), torch.zeros(1, device=device)
    groups = {host: dist.new_group([rank for rank, each in enumerate(hosts) if each == host]) for host in sorted({*hosts})}
    inside = hosts.count(own)
    if inside > 1:
        rates = processes.gather(2 * size * (inside - 1) / inside / all_reduce_seconds(tensor, 5, groups[own]))
        found |= {"link": min(rates), "link_share": 1.0}
    if len(groups) > 1:
        everybody = processes.world_size
        # Over a ring through all nodes each of them takes the data in once, whatever the number of its devices.
        rates = processes.gather(2 * size * (everybody - 1) / everybody / all_reduce_seconds(tensor, 5))
        found |= {"between_nodes": min(rates), "network_share": 1.0}
    latency = max(processes.gather(all_reduce_seconds(small, 20)))
    return {**found, "latency": latency / 2 / float(np.log2(processes.world_size))}
