"""Many small questions asked in one start of processes: to start a group takes longer than to train a toy.

A test asks, of a script: `ask(script, {"zero2": {"strategy": "zero2"}, "fsdp2": {"strategy": "fsdp2"}}, folder)`. The script, a
file beside it, answers one after the other in a group that stands:

    def answer(variant, processes, plan):
        ...
        return {"losses": training.losses}

    if __name__ == "__main__":
        serve(answer, {"strategy": "ddp", "steps": 4})
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, plan_parallel
from genscale.settings.config import ParallelSettings
from genscale.testing.processes import group, run
from genscale.testing.runs import Run, train_in_group

WHOLE_RUNS = Path(__file__)
"""The script of `train_many`: this one."""
Variant = dict[str, Any]
Answer = Callable[[Variant, Processes, ParallelPlan], Any]


def ask(script: Path, variants: Mapping[str, Variant], folder: Path, processes: int = 2, timeout: float = 280,
        environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a script that calls `serve` answers to each variant.

    Args:
        script: its file.
        variants: settings by name, as JSON can hold them.
        folder: where the answers are written; a script may keep what it likes beside them.
        processes: of the group.
        timeout: seconds for all.
        environment: variables besides those of this process.

    Raises:
        AssertionError: the script failed, or hung.
    """
    out = folder / "answers.pt"
    done = run(script, json.dumps(variants), out, command=group(processes), environment=environment, timeout=timeout)
    assert done.code == 0, f"exit code {done.code}: {script}\n{done.out}\n{done.err[-5000:]}"
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def train_many(variants: Mapping[str, Variant], folder: Path, processes: int = 2, **options: Any) -> dict[str, Run]:
    """Train whole runs one after the other in one group of processes; each is what `genscale train` makes of its settings.

    Args:
        variants: by name, `settings` as `genscale.testing.runs.train` takes them, and `again_from`, see `run_of`.
        folder: the run folders will lie in it under their names; a run that is there already goes on.
        processes, options: see `ask`.
    """
    return {name: Run(Path(path)) for name, path in ask(WHOLE_RUNS, variants, folder, processes, **options).items()}


def serve(answer: Answer, defaults: Mapping[str, Any] | None = None) -> None:
    """Answer the questions of `ask`, as the main part of a script; does not return.

    Args:
        answer: called with a variant, the group, and the plan of `strategy`, `offload`, `precision` and `optimizer`; what the
            first process's call returns is the answer: dicts, lists, numbers, texts and tensors. Of a variant, `name` is its
            name and `folder` that of the answers.
        defaults: of a variant.
    """
    run_and_leave(lambda: _serve(answer, json.loads(sys.argv[1]), defaults or {}, Path(sys.argv[2])))


def run_of(variant: Variant, processes: Processes) -> Run:
    """The run of a variant, in the folder of the answers under the variant's name: not there yet; or, where it says
    `again_from: [NAME, STEP]`, a copy of the run of another variant before it, cut after a step, to go on from."""
    run = Run(Path(variant["folder"]) / variant["name"])
    if processes.is_main and "again_from" in variant:
        name, step = variant["again_from"]
        Run(run.folder.with_name(name)).cut_after(step, run.folder)
    return run


def _serve(answer: Answer, variants: dict[str, Variant], defaults: Mapping[str, Any], out: Path) -> None:
    # As `genscale train` does: the launcher is asked first, then its variables are removed, then the group is made.
    variants = {name: {**defaults, **variant, "name": name, "folder": str(out.parent)} for name, variant in variants.items()}
    plans = {name: _plan(variant) for name, variant in variants.items()}
    clear_launch_environment()
    processes = Processes(need_group=True)
    answers = {name: answer(variant, processes, plans[name]) for name, variant in variants.items()}
    if processes.is_main:
        torch.save(answers, out)
    processes.close()


def _plan(variant: Variant) -> ParallelPlan:
    settings = ParallelSettings(strategy=variant.get("strategy", "ddp"), offload=variant.get("offload", "none"))
    return plan_parallel(settings, variant.get("precision", "fp32"), variant.get("optimizer", {}).get("name", "sgd"))


def _train(variant: Variant, processes: Processes, _plan: ParallelPlan) -> str:
    run = run_of(variant, processes)
    train_in_group(run.folder, variant["settings"], processes)
    return str(run.folder)


if __name__ == "__main__":
    serve(_train)
