"""What a checkpoint of a GPT with AdamW's moments costs: how long a step is held up, how long the save takes, and the load.

    python benchmarks/checkpoint_cpu.py --out benchmarks/results/checkpoint-cpu.json

Weights and moments are random; nothing is trained. Beside it torch.save and torch.load of the same tensors, with and without
waiting for the disk, and the asynchronous save of torch.distributed.checkpoint, in turns. Files that were just written are read
from memory. With two processes the longest of both counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import circumstances, write

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"layers": 12, "heads": 12, "width": 768, "positions": 1024, "vocab_size": 19_000}
SHAPES = {"one process": ("single", 1), "ddp, 2 processes": ("ddp", 2), "fsdp2, 2 processes": ("fsdp2", 2)}
TIMEOUT = 1500


def open_engine(strategy: str) -> Any:
    """An engine that holds a network and its optimizer's state, as in the middle of a run."""
    from genscale.families.gpt.network import GPT, GPTSettings
    from genscale.parallel.processes import Processes
    from genscale.parallel.strategies import ParallelPlan, build_engine
    from genscale.settings.config import OptimizerSettings, ParallelSettings
    from genscale.training.optimizers import make_optimizer

    processes = Processes(need_group=True)
    with torch.device("meta"):
        settings = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
        network = GPT(GPTSettings(**settings), SHAPE["vocab_size"])
    plan = ParallelPlan(strategy, "none", "fp32", processes.world_size)
    engine = build_engine(plan, processes, ParallelSettings(strategy=strategy), "fp32", 1.0, 1, 1)
    engine.prepare({"gpt": network}, lambda module: make_optimizer(module, OptimizerSettings()),
                   {"gpt": lambda name: network.initial_weight(name, 0)})
    shapes = {name: tuple(parameter.shape) for name, parameter in engine.modules["gpt"].named_parameters()}
    keys = [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "step") for name in shapes]

    def moment(key: str) -> Tensor:
        kind, name = key.split("/", 1)
        return torch.tensor(1.0) if kind == "step" else torch.rand(shapes[name])

    engine.load_optimizer_state("gpt", keys, moment)
    return engine


class Ours:
    """Saves through the hooks' own saver, and waits for the save as the next one would."""

    def __init__(self, engine: Any, folder: Path) -> None:
        from genscale.checkpoint.saving import Saver

        self.engine, self.folder, self.step = engine, folder, 0
        self.saver = Saver(folder, engine.processes, keep=1)

    def save(self) -> dict[str, float]:
        from genscale.checkpoint.saving import Contents

        self.step += 1
        state = {"step": self.step, "data": {}, "scalers": {}}
        started = time.perf_counter()
        pieces = {"networks/gpt": self.engine.network_pieces("gpt"), "optimizers/gpt": self.engine.optimizer_pieces("gpt")}
        self.saver.start(pieces, Contents(self.step, state, "", {}, best_step=None, last=False))
        held_up = time.perf_counter() - started
        if not self.saver.settle():
            raise SystemExit("the save failed")
        return {"hold-up": held_up, "save, waited for": time.perf_counter() - started}

    def load(self) -> dict[str, float]:
        from genscale.checkpoint.checkpoints import Checkpoint

        checkpoint = Checkpoint(self.folder / f"step-{self.step:08d}")
        started = time.perf_counter()
        problem = checkpoint.problem()
        verified = time.perf_counter()
        self.engine.load_network_state("gpt", checkpoint.tensors("networks", "gpt"))
        stored = checkpoint.tensors("optimizers", "gpt")
        self.engine.load_optimizer_state("gpt", stored.keys(), stored)
        assert problem is None
        return {"verify": verified - started, "load into the engine": time.perf_counter() - verified}


class Theirs:
    """torch.save and torch.load of the same tensors in one process."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.network, self.optimizer, self.folder = engine.modules["gpt"], engine.optimizers["gpt"], folder
        folder.mkdir()
        self.file = folder / "state.pt"

    def state(self) -> dict[str, Any]:
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self) -> dict[str, float]:
        took = {"torch.save": timed(lambda: torch.save(self.state(), self.file))}
        started = time.perf_counter()
        with self.file.open("wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        return took | {"torch.save, fsync": time.perf_counter() - started, **self.distributed()}

    def distributed(self) -> dict[str, float]:
        from torch.distributed import checkpoint

        started = time.perf_counter()
        saving = checkpoint.async_save({"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()},
                                       checkpoint_id=str(self.folder / "distributed"))
        held_up = time.perf_counter() - started
        saving.result()
        return {"torch.distributed.checkpoint.async_save, hold-up": held_up,
                "torch.distributed.checkpoint.async_save, waited for": time.perf_counter() - started}

    def load(self) -> dict[str, float]:
        def load() -> None:
            state = torch.load(self.file, weights_only=True)
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

        return {"torch.load into the network and the optimizer": timed(load)}


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(strategy: str, repeats: int, folder: Path) -> None:
    """In each process of a shape; rank 0 prints what it came to."""
    torch.set_num_threads(1)
    engine = open_engine(strategy)
    processes = engine.processes
    savers: list[Any] = [Ours(engine, folder / "ours")]
    if strategy == "single":
        savers.append(Theirs(engine, folder / "theirs"))
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):  # the first one faults its pages
        took: dict[str, float] = {}
        for saver in savers:
            os.sync()
            took |= saver.save()
            took |= saver.load()
        rounds.append(took)
    all_rounds = zip(*processes.gather(rounds), strict=True)
    together = [{key: max(each[key] for each in same) for key in same[0]} for same in all_rounds]
    if processes.is_main:
        size = sum(file.stat().st_size for file in (folder / "ours").rglob("*") if file.is_file())
        medians = {key: round(statistics.median(each[key] for each in together[1:]), 3) for key in together[0]}
        share = statistics.median(each["hold-up"] / each["save, waited for"] for each in together[1:])
        print("RESULT " + json.dumps({"bytes": size, "median_seconds": medians, "hold_up_share_of_the_save": round(share, 4),
                                      "first_hold_up_seconds": round(together[0]["hold-up"], 3)}), flush=True)
    processes.close()


def run(name: str, repeats: int) -> dict[str, Any]:
    strategy, count = SHAPES[name]
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-"))
    command = [sys.executable, __file__, "--strategy", strategy, "--folder", str(folder), "--repeats", str(repeats)]
    if count > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", default=";".join(SHAPES), help="which of them, with semicolons between")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--strategy", help=argparse.SUPPRESS)  # of one process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.strategy:
        from genscale.parallel.exit_together import run_and_leave

        run_and_leave(lambda: measure(arguments.strategy, arguments.repeats, arguments.folder))
    load_before, results = os.getloadavg()[0], {}
    for name in arguments.shapes.split(";"):
        results[name] = run(name, arguments.repeats)
        print(name, json.dumps(results[name], indent=1), flush=True)
    busy = {"load_average_before": round(load_before, 2), "load_average_after": round(os.getloadavg()[0], 2)}
    write({**circumstances(["torch", "safetensors"]), "shape": SHAPE, "repeats": arguments.repeats, **busy, "results": results},
          arguments.out)


if __name__ == "__main__":
    main()
