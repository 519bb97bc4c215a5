"""What the guards cost: a step with every guard on against one with none, taking turns.

    python benchmarks/guards_overhead.py --out benchmarks/results/guards-overhead-cpu.json

On: every update judged (loss, gradient, spikes), buffers kept, progress noted for the watchdog, whose thread runs. Off: the
same trainer without any of it, and once more (`control`). All train from the same weights on the same batches, and their losses
must be equal. They alternate step by step in one process. A busy machine drowns the difference of two steps: so the CPU time
that the training thread spends inside the guards is counted as well (`inside_the_guards`), and is what to go by.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from genscale.data.images.grouped import PackedImageDataSettings
from genscale.data.text.data import TextDataSettings
from genscale.families.dcgan.settings import GANSettings
from genscale.families.gpt.settings import GPTSettings
from genscale.hook import StepReport
from genscale.objectives.base import Phase
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.parallel.engine import StepResult
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ScheduleSettings, TrainSettings
from genscale.supervise.ending import Ending
from genscale.supervise.watchdog import Watchdog
from genscale.training import trainer
from genscale.training.kept_buffers import KeptBuffers
from genscale.training.phase_outcome import PhaseOutcome
from genscale.training.trainer import Count, MicroBatches, Trainer
from our_step import OurSteps
from report import circumstances, write
from turns import compared, take_turns

import torch
from torch import Tensor

WARMUP_STEPS = 3
TRAIN = {"steps": 10**6, "precision": "fp32"}
CONFIGS = {
    "gpt": lambda: Config(model=GPTSettings(layers=4, heads=4, width=256, positions=128),
                          data=TextDataSettings(sequence_length=128), train=TrainSettings(global_batch_size=4, **TRAIN)),
    "dcgan": lambda: Config(model=GANSettings(width=64), objective=GANObjectiveSettings(),
                            data=PackedImageDataSettings(size=32, validation_images=179),
                            train=TrainSettings(global_batch_size=32, **TRAIN)),
}  # fmt: skip


class Unguarded(Trainer):
    """The loop without guards."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard.settle = lambda outcome: None
        self.processes.note = lambda doing: None

    def run_phase(self, phase: Phase, step: int, batches: MicroBatches, count_of_all: Count | None = None) -> PhaseOutcome:
        outcome: list[PhaseOutcome] = []

        def look(result: StepResult) -> bool | Tensor:
            outcome.append(PhaseOutcome(step, phase, totals, count, result, self.processes))
            return False

        totals, count = self._accumulate(phase, step, batches, count_of_all)
        self.engine.step(phase.network, look)
        self.engine.train_only(None)
        return outcome[0]


class Counted(Trainer):
    """The loop with guards, whose CPU time in the training thread is added up."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.inside = [0.0]  # seconds by step, the first for what comes before
        self.guard.leaves_out, self.guard.settle = self._timed(self.guard.leaves_out), self._timed(self.guard.settle)
        self.processes.note = self._timed(self.processes.note)
        trainer.KeptBuffers = lambda buffers: _TimedBuffers(KeptBuffers(buffers), self._timed)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*arguments)
            finally:
                self.inside[-1] += time.thread_time() - started

        return timed

    def train_step(self, *arguments: Any) -> StepReport:
        self.inside.append(0.0)
        return super().train_step(*arguments)


class _TimedBuffers:
    def __init__(self, buffers: KeptBuffers, timed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.keep, self.put_back = timed(buffers.keep), timed(buffers.put_back)


def measure(name: str, steps: int) -> dict[str, Any]:
    contestants: dict[str, OurSteps] = {}
    for label, kind in (("on", Counted), ("off", Unguarded), ("control", Unguarded)):
        config = replace(CONFIGS[name](), optimizer=OptimizerSettings(lr=1e-4), schedule=ScheduleSettings(name="constant"),
                         guards=GuardSettings(spikes="skip"))
        contestants[label] = OurSteps(config, kind)
    losses: dict[str, list[dict[str, float]]] = {label: [] for label in contestants}

    def step(label: str) -> None:
        metrics = contestants[label]().metrics
        losses[label].append({key: value for key, value in metrics.items() if key.endswith("loss")})

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        processes = contestants["on"].processes
        watchdog = Watchdog(Path(folder), processes, Ending(Path(folder), 0), config.guards.hang_minutes, None)
        watchdog.start()
        watchdog.loop_begins()
        turns = take_turns({label: partial(step, label) for label in contestants}, steps, WARMUP_STEPS)
        watchdog.close()
    for contestant in contestants.values():
        contestant.close()
    if losses["on"] != losses["off"]:
        raise SystemExit(f"the two do not train alike: {losses}")
    inside = contestants["on"].trainer.inside[WARMUP_STEPS + 1 :]
    shares = [part / turn.cpu_seconds for part, turn in zip(inside, turns["on"], strict=True)]
    return {"parameters": contestants["on"].parameters,
            "inside_the_guards": {"microseconds_a_step": round(1e6 * statistics.median(inside), 1),
                                  "share_of_cpu_time": round(statistics.median(shares), 5)},
            **compared(turns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default=",".join(CONFIGS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = circumstances(["torch"]) | {"threads": 1, "families": {}}
    for name in arguments.only.split(","):
        result["families"][name] = measure(name, arguments.steps)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
