"""What torch.compile makes of a run, where no GPU is: graphs of the blocks, and bytes that the loss moves for every logit.

    python benchmarks/compile_counts.py --out benchmarks/results/compile-counts.json

Graphs: runs of a few steps with an evaluation, whose blocks dynamo traces and nothing compiles further; with torch's own limit
of recompilations, and with that of `parallel.compile`. Bytes: of one chunk of logits in bf16, the product that makes them, what
turns them into nats and errors, and the two products that read the errors; operation by operation, and as torch's compiler says
of the code that it would write (here for a CPU).
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import genscale
from genscale.families import family
from genscale.models import cross_entropy
from genscale.models.device_kind import planned_on
from genscale.parallel import engine
from report import circumstances, write

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config, metrics
from torch._inductor.compile_fx import inductor_metrics_log
from torch.utils._python_dispatch import TorchDispatchMode

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
TOKENS, VOCABULARY = 512, 8192
OF_TARGETS = {torch.ops.aten.gather.default, torch.ops.aten.scatter_add_.default}
"""These touch one logit of each token, and not all of what they are given."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default=";".join(NETWORKS), help="those whose graphs are counted, by semicolons")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    result = circumstances(["torch"]) | {"bytes_a_logit": bytes_a_logit(), "graphs": {}}
    for name in filter(None, arguments.networks.split(";")):
        result["graphs"][name] = {"torch's own settings": graphs(name, lambda: None), "parallel.compile": graphs(name, None)}
    write(result, arguments.out)


if __name__ == "__main__":
    main()
