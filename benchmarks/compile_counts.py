"""What torch.compile makes of a run, where no GPU is: graphs of the blocks, what a step gives a device to do, and bytes that
the loss moves for every logit.

    python benchmarks/compile_counts.py --out benchmarks/results/compile-counts.json

Graphs: runs of a few steps with an evaluation, whose blocks dynamo traces and nothing compiles further; with torch's own limit
of recompilations, and with that of `parallel.compile`. Bytes: of one chunk of logits in bf16, the product that makes them, what
turns them into nats and errors, and the two products that read the errors; operation by operation, and as torch's compiler says
of the code that it would write (here for a CPU).

Steps: all that a whole step of image networks gives a device, of forwards, backwards, optimizers, guard and averages as on one
GPU, eager and with `parallel.compile`: operations one by one, an operation on a list of tensors counted once, as fused AdamW
is; and in compiled graphs the kernels that torch's compiler writes for a CPU (they are not compiled further, and do nothing)
and the operations that these graphs call. Bytes: what all of them read and write. A GPU's compiler fuses in
another way, and libraries make one to three launches of a convolution.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import genscale
from genscale.families import family
from genscale.models import cross_entropy
from genscale.models.device_kind import planned_on
from genscale.parallel import engine
from gpu_networks import Run, Shape, gan, vae
from report import circumstances, write
from step_counts import is_work

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config, metrics
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode
from torch._inductor.compile_fx import inductor_metrics_log
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.scheduler import BaseSchedulerNode, FusedSchedulerNode, SchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, 12 layers, dropout": ("gpt", {"model.layers": 12, "model.dropout": 0.1}),
    "llama, 12 layers": ("gpt", {"model.layers": 12, "model.preset": "llama"}),
    "dcgan, 64 pixels": ("dcgan", {"data.size": 64, "objective.augmentation": "[]"}),
    "dcgan, 256 pixels": ("dcgan", {"data.size": 256, "objective.augmentation": "[]", "data.validation_images": 8}),
    "residual gan, 64 pixels": ("dcgan", {"data.size": 64, "model.architecture": "residual", "model.generator_norm": "group",
                                          "model.discriminator_norm": "none", "objective.augmentation": "[]"}),
    "vae, 32 pixels": ("vae", {"data.size": 32}),
}  # fmt: skip
RUN = {"parallel.compile": True, "train.steps": 2, "train.global_batch_size": 4, "train.precision": "bf16",
       "train.evaluate_every": 0, "guards.dry_batch": False, "tracking.wandb": "disabled"}  # fmt: skip
HINGE = {"loss": "hinge"}
STEPS: dict[str, tuple[Callable[[Shape], Any], dict[str, Any]]] = {
    "dcgan-64": (lambda shape: gan(shape, width=16), {}),
    "as dcgan-256-large, 64 pixels": (lambda shape: gan(shape, norm="none", objective=HINGE, width=16, spectral_norm=True,
                                                        upsampling="resize"), {"recompute": "full"}),
    "vae, 64 pixels": (lambda shape: vae(shape, width=16), {}),
}
"""Networks of whole steps, narrower than they would be: operations are as many at any width."""
BATCH = Shape(16, 64)
TOKENS, VOCABULARY = 512, 8192
OF_TARGETS = {torch.ops.aten.gather.default, torch.ops.aten.scatter_add_.default}
"""These touch one logit of each token, and not all of what they are given."""

READ_TWICE = {torch.ops.aten.native_batch_norm.default: 1, torch.ops.aten.native_batch_norm_backward.default: 2,
              torch.ops.aten.native_group_norm.default: 1, torch.ops.aten.native_group_norm_backward.default: 2}
"""Of these so many arguments are read for their statistics first, in one kernel or several, and so in compiled ones."""


@contextmanager
def only_traced() -> Iterator[None]:
    """Blocks are traced, and run as they are."""
    whole = nn.Module.compile
    nn.Module.compile = functools.partialmethod(whole, backend="eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.compile = whole  # type: ignore[method-assign]


def graphs(name: str, settle: Callable[[], None] | None) -> dict[str, int]:
    """Of a run: graphs, places where one is broken, and functions that were left as they are, for they had too many."""
    about, settings = NETWORKS[name]
    torch._dynamo.reset()
    counters.clear()
    ours = engine._settle_compiler
    with tempfile.TemporaryDirectory() as folder, only_traced():
        engine._settle_compiler = settle or ours
        try:
            genscale.train(genscale.config(about, {**family(about).tiny, **settings, **RUN, "run.dir": folder}))
        finally:
            engine._settle_compiler = ours
    left = sum(count for reason, count in counters["unimplemented"].items() if "recompile" in str(reason))
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values()),
            "left as they are": left + sum(counters["recompile_limit"].values())}


class Moved(TorchDispatchMode):
    """Adds up the bytes of tensors as large as a chunk of logits that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function not in OF_TARGETS:
            read = args[1:2] if function is torch.ops.aten.copy_.default else args  # what is copied over is not read
            for each in (*read, *(out if isinstance(out, tuple) else (out,))):
                self.bytes += each.nbytes if isinstance(each, Tensor) and each.numel() == TOKENS * VOCABULARY else 0
        return out


def bytes_a_logit() -> dict[str, float]:
    """Of the loss in several passes, as genscale had it on a GPU at first, and as it is now."""
    hidden, matrix = torch.randn(TOKENS, 64).bfloat16(), torch.randn(VOCABULARY, 64).bfloat16()
    wanted = torch.randint(VOCABULARY, (TOKENS, 1))
    found = {}
    for name, error_of in (("in several passes", _several), ("compiled", _compiled)):
        with Moved() as products:
            raw = torch.mm(hidden, matrix.T)
        moved, error = error_of(raw, wanted)
        with Moved() as after:
            torch.mm(error, matrix)
            torch.mm(error.T, hidden)
        found[name] = (products.bytes + moved + after.bytes) / raw.numel()
    return found


def _several(raw: Tensor, wanted: Tensor) -> tuple[int, Tensor]:
    probabilities = torch.empty(raw.shape)
    with planned_on("gpu"), Moved() as moved:  # as on a GPU, which is not asked whether all targets are there
        _, error = cross_entropy._nats_and_error(raw, wanted, probabilities)
    return moved.bytes, error


def _compiled(raw: Tensor, wanted: Tensor) -> tuple[int, Tensor]:
    torch._dynamo.reset()
    metrics.reset()
    inductor_metrics_log.setLevel(logging.INFO)  # else they are not counted
    with config.patch(force_disable_caches=True):  # the bytes are counted where code is made
        _, error = torch.compile(cross_entropy._in_one_pass, dynamic=False)(raw, wanted)
    return metrics.num_bytes_accessed, error


class Given(TorchDispatchMode):
    """Counts what a step gives the device, while it `counts`.

    Attributes:
        found: by part of the step, and bytes in all.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.found, self.counts, self._graphs = run, Counter[str](), False, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if self.counts and is_work(function):
            part = "forward and backward" if self.run.processes.doing.endswith(("forward", "backward")) else "the rest"
            self.found["operations of compiled graphs" if self._graphs else f"one by one, {part}"] += 1
            read = args[1:] if function is torch.ops.aten.copy_.default else (args, kwargs)  # what is copied over is not read
            read = (read, args[:READ_TWICE.get(function, 0)])
            self.found["bytes"] += sum(each.nbytes for each in tree_leaves((read, out)) if isinstance(each, Tensor))
        return out

    @contextmanager
    def graphs(self) -> Iterator[None]:
        """Inside, compiled graphs are counted too, and their kernels do nothing."""
        made, called, kernels = CompiledFxGraph.__init__, CompiledFxGraph.__call__, AsyncCompile.cpp_pybinding

        def make(graph: Any, callable_: Any, lowering: Any, *args: Any, **kwargs: Any) -> None:
            made(graph, callable_, lowering, *args, **kwargs)
            graph.kernels = [node for node in lowering.scheduler.nodes if isinstance(node, (SchedulerNode, FusedSchedulerNode))]

        def call(graph: Any, inputs: Any) -> Any:
            if self.counts:
                self.found["compiled graphs"] += 1
                self.found["kernels of compiled graphs"] += sum(map(_kernels, graph.kernels))
                self.found["bytes"] += sum(node.get_read_write_buffers_sizes() for node in graph.kernels)
            self._graphs += 1
            try:
                return called(graph, inputs)
            finally:
                self._graphs -= 1

        CompiledFxGraph.__init__, CompiledFxGraph.__call__ = make, call  # type: ignore[method-assign]
        AsyncCompile.cpp_pybinding = lambda *_: lambda *_: None  # type: ignore[method-assign]
        try:
            with config.patch({"force_disable_caches": True, "cpp.simdlen": 1}):
                yield
        finally:
            CompiledFxGraph.__init__, CompiledFxGraph.__call__ = made, called  # type: ignore[method-assign]
            AsyncCompile.cpp_pybinding = kernels  # type: ignore[method-assign]


def _kernels(node: BaseSchedulerNode) -> int:
    """Walks that a CPU takes side by side are kernels of their own elsewhere."""
    return len(node.get_outer_nodes()) if isinstance(node, OuterLoopFusedSchedulerNode) else 1


def given_in_a_step(name: str, compiled: bool) -> dict[str, int]:
    """Of a step in bf16 with averages, as on a GPU: where nobody reads what it has come to."""
    torch._dynamo.reset()
    with planned_on("gpu"):
        objective, options = STEPS[name]
        run = Run(objective(BATCH), BATCH, weight_decay=0.0, ema=1e4, clip=0.0, accumulation=1, compile=compiled, **options)
        with Given(run) as given, given.graphs() if compiled else contextlib.nullcontext():
            run.step(2)
            given.counts = True
            run.step()
    found = dict(sorted(given.found.items()))
    moved = found.pop("bytes")
    return {**found, "in all": sum(found.values()) - found.get("compiled graphs", 0), "bytes": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=";".join(NETWORKS), help="those whose graphs are counted, by semicolons")
    parser.add_argument("--steps", default=";".join(STEPS), help="those of which a whole step is counted, by semicolons")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result = circumstances(["torch"]) | {"bytes_a_logit": bytes_a_logit(), "graphs": {}}
    for name in filter(None, arguments.networks.split(";")):
        result["graphs"][name] = {"torch's own settings": graphs(name, lambda: None), "parallel.compile": graphs(name, None)}
    result["steps"] = {name: {"eager": given_in_a_step(name, False), "parallel.compile": given_in_a_step(name, True)}
                       for name in filter(None, arguments.steps.split(";"))}
    write(result, arguments.out)


if __name__ == "__main__":
    main()
