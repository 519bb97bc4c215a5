"""How fast one GPU trains: tokens/s and share of its peak, images/s, the loss alone, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from genscale.models.cross_entropy import summed_cross_entropy
from genscale.objectives.base import Objective
from genscale.parallel.determinism import deterministic
from genscale.tracking.peaks import device_name, peak_flops
from gpu_networks import Run, Shape, gan, gpt, vae

import torch
import torch.nn.functional as F
from torch import Tensor

TIME, VOCABULARY = 1024, 50304
DOCUMENT = 512
"""Tokens of a document on average, where documents are separate."""
SIZES = {"124m": {"layers": 12, "heads": 12, "width": 768}, "1558m": {"layers": 48, "heads": 25, "width": 1600}}
SPEEDS: dict[str, dict[str, Any]] = {
    "loss alone": {},
    "124m, batch 32": {"size": "124m", "batch": 32, "compile": True},
    "124m, batch 32, eager": {"size": "124m", "batch": 32},
    "1558m, batch 8": {"size": "1558m", "batch": 8, "compile": True},
    "1558m, batch 8, fp8": {"size": "1558m", "batch": 8, "compile": True, "precision": "fp8"},
    "dcgan-64, width 128, batch 128": {"images": "dcgan", "batch": 128},
    "dcgan-64, width 128, batch 128, compiled": {"images": "dcgan", "batch": 128, "compile": True},
    "vae-32, width 64, batch 128": {"images": "vae", "batch": 128},
    "residual gan-64, width 64, batch 64": {"images": "residual", "batch": 64},
    "124m, batch 64": {"size": "124m", "batch": 64, "compile": True},
    "124m, batch 32, fsdp2": {"size": "124m", "batch": 32, "compile": True, "strategy": "fsdp2"},
    "124m, batch 32, llama": {"size": "124m", "batch": 32, "compile": True, "preset": "llama"},
    "124m, batch 32, documents": {"size": "124m", "batch": 32, "compile": True, "separate": True},
    "124m, batch 32, documents, dense mask": {"size": "124m", "batch": 32, "compile": True, "separate": True, "dense": True},
    "124m, 4 of 8192 tokens, documents": {"size": "124m", "batch": 4, "time": 8192, "compile": True, "separate": True},
    "124m, 4 of 8192 tokens, documents, dense mask": {"size": "124m", "batch": 4, "time": 8192, "compile": True,
                                                      "separate": True, "dense": True},
    "124m, batch 32, deterministic": {"size": "124m", "batch": 32, "compile": True, "deterministic": True},
}
"""What is measured, what matters most first."""
AIMS = {"124m, batch 32": ("mfu", 0.50), "1558m, batch 8": ("mfu", 0.55),
        "dcgan-64, width 128, batch 128": ("units_per_second", 25_000)}
"""On one H100 or H200: a figure and the least it is to be."""


def measure(name: str, toy: bool) -> dict[str, Any]:
    """One of `SPEEDS`, in a process of its own."""
    if name == "loss alone":
        return loss_alone(toy)
    options = dict(SPEEDS[name])
    size, images, batch = options.pop("size", None), options.pop("images", None), 2 if toy else options.pop("batch")
    options.pop("batch", None)
    length = options.pop("time", TIME)
    if size is not None:
        shape = Shape(batch, 64 if toy else length, 512 if toy else VOCABULARY, DOCUMENT if "separate" in options else None)
        network = {"layers": 2, "heads": 2, "width": 32} if toy else SIZES[size]
        architecture = {key: options.pop(key) for key in ("preset", "separate", "dense") if key in options}
        objective: Objective = gpt(shape, **network, **architecture)
    else:
        shape = Shape(batch, 32 if toy or images == "vae" else 64)
        made: dict[str, Callable[[], Objective]] = {
            "dcgan": lambda: gan(shape, width=4 if toy else 128), "vae": lambda: vae(shape, width=8 if toy else 64),
            "residual": lambda: gan(shape, "residual", "none", {"loss": "hinge"}, spectral_norm=True, width=4 if toy else 64)}
        objective = made[images]()
        options |= {"clip": 0.0, "ema": 1e4}
    with deterministic(options.pop("deterministic", False)):
        if toy:
            options = {**options, "compile": False, "precision": "bf16"}
        run = Run(objective, shape, accumulation=1, **options)
        return timed(run, 3 if toy else 40 if size is not None else 200, toy)


def timed(run: Run, steps: int, toy: bool) -> dict[str, Any]:
    """Milliseconds a step, after some that are not counted, and what follows from them."""
    began = time.perf_counter()
    run.step(3)
    settle()
    first = time.perf_counter() - began
    run.step(max(1, steps // 4))
    settle()
    began, host = time.perf_counter(), time.thread_time()
    run.step(steps)
    host = time.thread_time() - host
    settle()
    seconds = (time.perf_counter() - began) / steps
    rate = run.shape.samples * run.objective.units_per_sample / seconds
    facts: dict[str, Any] = {"ms_a_step": round(1e3 * seconds, 2), "host_cpu_ms_a_step": round(1e3 * host / steps, 2),
                             "first_three_steps_s": round(first, 1), "units_per_second": round(rate),
                             "unit": run.objective.unit}
    flops = run.objective.flops_per_unit()
    if flops is not None:
        peak = None if toy else peak_flops(device_name(run.processes.device), "bf16")  # of fp8 too, so that the two compare
        facts |= {"tflops": round(flops * rate / 1e12, 1), "mfu": round(flops * rate / peak, 4) if peak else None}
    if torch.cuda.is_available():
        facts |= {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                  "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2)}
    return facts


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def loss_alone(toy: bool) -> dict[str, Any]:
    """The loss of 32 x 1024 tokens and its gradients: ours against torch's, plain and compiled."""
    tokens, width, vocabulary = (256, 32, 512) if toy else (32 * TIME, 768, VOCABULARY)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-1, reduction="sum")

    facts: dict[str, Any] = {}
    values: dict[str, float] = {}
    compiled = plain if toy else torch.compile(plain)
    for label, loss in (("ours", summed_cross_entropy), ("torch", plain), ("torch_compiled", compiled)):

        def once(loss: Callable[..., Tensor] = loss) -> float:
            with torch.autocast(device, dtype=torch.bfloat16):
                value = loss(hidden, weight, targets)
            value.backward()
            return value.item()

        for _ in range(3):
            values[label] = once()
        settle()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(10):
            once()
        settle()
        facts[f"{label}_ms"] = round(100 * (time.perf_counter() - began), 2)
        if torch.cuda.is_available():
            facts[f"{label}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        hidden.grad = weight.grad = None
    return {**facts, "relative_difference": f"{abs(values['ours'] / values['torch'] - 1):.1e}"}
