"""Peak memory of one process in a training step, measured and by a formula: what each way of saving memory saves.

    python benchmarks/memory.py --out benchmarks/results/memory-cpu.json

Each variant runs in processes of its own. On the CPU the peak is that of the resident set (Linux: VmHWM, reset after the first
step) less what the process had before the network was made; on a GPU it is torch.cuda.max_memory_allocated. All in fp32, AdamW.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import circumstances, write

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"layers": 8, "heads": 8, "width": 512, "vocab_size": 32768, "time": 512, "batch": 2}
CHUNK = 128
VARIANTS = {
    "plain": {},
    "chunked cross-entropy": {"loss_chunk": CHUNK},
    "and full checkpointing": {"loss_chunk": CHUNK, "activation_checkpointing": "full"},
    "and selective checkpointing": {"loss_chunk": CHUNK, "activation_checkpointing": "selective"},
    "ddp": {"loss_chunk": CHUNK, "strategy": "ddp"},
    "zero3": {"loss_chunk": CHUNK, "strategy": "zero3"},
    "fsdp2": {"loss_chunk": CHUNK, "strategy": "fsdp2"},
}
PROCESSES = 2  # of the last three
FLOAT = 4
GIB = 2**30


# --- the formula ---------------------------------------------------------------------------------------------------------


def formula(variant: dict[str, Any], shape: dict[str, int]) -> dict[str, float]:
    """Bytes by cause and the peak: the largest of three moments.

    loss: all kept activations, and the logits. backward: those of the first block to go back, with the head's gradient.
    embedding: no activations, all gradients, and that of the look-up before it is added to the head's (they are tied).
    Of a token, a block keeps 16 widths: both norms' inputs and outputs (4), query, key, value (3), the mixed values (1), the
    MLP's hidden values before and after GELU (4 + 4). Checkpointing keeps its input (1), or with it the results of matrix
    products and attention (1 + 3 + 1 + 1 + 4 + 1), and makes one block's anew.
    """
    layers, width, vocab, tokens = shape["layers"], shape["width"], shape["vocab_size"], shape["time"] * shape["batch"]
    strategy, mode = variant.get("strategy", "single"), variant.get("activation_checkpointing", "none")
    ranks = PROCESSES if strategy != "single" else 1
    block, head = 12 * width**2 * FLOAT, vocab * width * FLOAT
    weights = layers * block + head + shape["time"] * width * FLOAT
    row = tokens * width * FLOAT
    kept = layers * row * {"none": 16, "full": 1, "selective": 11}[mode]
    working = row * (9 + (16 if mode != "none" else 0))  # gradients inside a block's MLP; what is recomputed
    chunk = variant.get("loss_chunk")
    if chunk is None:
        logits = 3 * tokens * vocab * FLOAT  # log-probabilities, and the gradients by them and by the logits
    else:
        logits = 2 * chunk * vocab * FLOAT + head + row  # two buffers, and the gradients made in the forward pass
    rest, gathered, gradients = _spread(strategy, ranks, weights, head, block)
    moments = {"loss": rest + gathered + kept + 2 * row + logits,
               "backward": rest + gathered + kept + working + head,
               "embedding": rest + gradients + head}
    return {"weights_and_optimizer": rest, "gathered_weights": gathered, "kept_activations": kept, "loss": logits,
            "gradients_and_their_exchange": gradients, "at": max(moments, key=moments.get), "peak": max(moments.values())}


def _spread(strategy: str, ranks: int, weights: float, head: float, block: float) -> tuple[float, float, float]:
    """(at rest, weights gathered during forward and backward, gradients and what goes with them at the end of backward)."""
    if strategy == "zero3":
        # Shards of the weights, their fp32 masters, two moments, gradients; and a bucket, which stays, for all gradients (5e8
        # of them at most). DeepSpeed releases no gathered weight before 1e9 of them are alive.
        return 5 * weights / ranks + weights, weights, weights
    if strategy == "fsdp2":
        # The outermost group (the embeddings) stays gathered from forward to backward, and one block with its successor. Its
        # gradient is reduced last, from a buffer of its own.
        return 3 * weights / ranks, head + 2 * block, 3 * head + weights / ranks
    if strategy == "ddp":  # the buckets in which gradients live stay when the gradients go
        return 4 * weights, 0.0, 0.0
    return 3 * weights, 0.0, weights


# --- one process of a variant --------------------------------------------------------------------------------------------


class Gauge:
    """Bytes held by this process: allocated by torch on a GPU, resident on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        gc.collect()
        self.start = 0 if self.cuda else psutil.Process().memory_info().rss

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew at the present size

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - self.start


def measure(variant: dict[str, Any]) -> None:
    """Two steps through the trainer's own body; prints the peak of the second."""
    from genscale.data.text.tokenizers import ByteTokenizer
    from genscale.families.gpt.network import GPT, GPTSettings
    from genscale.families.gpt.objective import LanguageModel
    from genscale.parallel.processes import Processes
    from genscale.parallel.strategies import ParallelPlan, build_engine
    from genscale.settings.config import Config, OptimizerSettings, ParallelSettings
    from genscale.training.optimizers import make_optimizer
    from genscale.training.trainer import Trainer

    strategy, tokens = variant.get("strategy", "single"), SHAPE["time"] * SHAPE["batch"]
    processes = Processes(need_group=strategy in ("zero3", "fsdp2"))
    if strategy == "zero3":
        from genscale.parallel.zero import import_deepspeed

        import_deepspeed(processes.device)  # hundreds of megabytes of code are not the step's
    settings = ParallelSettings(strategy=strategy, activation_checkpointing=variant.get("activation_checkpointing", "none"))
    engine = build_engine(ParallelPlan(strategy, "none", "fp32", processes.world_size), processes, settings, "fp32", 1.0,
                          SHAPE["batch"], 1)
    with torch.device("meta"):
        network = GPT(GPTSettings(layers=SHAPE["layers"], heads=SHAPE["heads"], width=SHAPE["width"], positions=SHAPE["time"],
                                  loss_chunk=variant.get("loss_chunk", tokens)), SHAPE["vocab_size"])
    objective = LanguageModel(network, ByteTokenizer(), SHAPE["time"], weights=lambda name: network.initial_weight(name, 0))
    gauge = Gauge(processes.device)
    config = Config()
    engine.prepare(objective.networks, lambda module: make_optimizer(module, OptimizerSettings()),
                   {"gpt": objective.initial_weights("gpt")})
    trainer = Trainer(config, objective, engine, loader=None, hooks=[], last_good=lambda: "none")
    text = torch.randint(0, 256, (SHAPE["batch"], SHAPE["time"] + 1), generator=torch.Generator().manual_seed(processes.rank))
    for step in (1, 2):
        if step == 2:
            gauge.reset()
        trainer.run_phase(objective.phases[0], step, [{"tokens": text, "sample": torch.arange(SHAPE["batch"])}]).read()
    peaks = processes.gather(gauge.peak())
    if processes.is_main:
        print(f"PEAK {max(peaks)}", flush=True)
    processes.close()


# --- all of them ---------------------------------------------------------------------------------------------------------


def run(name: str) -> int | None:
    """Peak bytes a process of one variant, from processes of its own; None where there are too few GPUs."""
    command = [sys.executable, __file__, "--variant", name]
    if "strategy" in VARIANTS[name]:
        gpus = torch.cuda.device_count()
        if 0 < gpus < PROCESSES:
            return None
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", *command[1:]]
    # What is freed goes back to the system at once, or the resident set would show what was needed earlier.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536",
                   "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return int(lines[0].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of them, with commas between")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # of one process
    arguments = parser.parse_args()
    if arguments.variant:
        from genscale.parallel.exit_together import run_and_leave

        run_and_leave(lambda: measure(VARIANTS[arguments.variant]))
    results = {}
    for name in arguments.variants.split(","):
        expected, peak = formula(VARIANTS[name], SHAPE), run(name)
        if peak is None:
            print(f"{name:28} needs {PROCESSES} GPUs", flush=True)
            continue
        results[name] = {"measured_gib": round(peak / GIB, 3), "formula_gib": round(expected["peak"] / GIB, 3),
                         "ratio": round(peak / expected["peak"], 3), "at": expected.pop("at"),
                         "terms_gib": {key: round(value / GIB, 3) for key, value in expected.items() if key != "peak"}}
        print(f"{name:28} measured {results[name]['measured_gib']:.3f} GiB, formula {results[name]['formula_gib']:.3f} GiB "
              f"(at the {results[name]['at']})", flush=True)
    write({**circumstances(["torch", "accelerate", "deepspeed"]), "shape": SHAPE, "processes": PROCESSES, "results": results},
          arguments.out)


if __name__ == "__main__":
    main()
