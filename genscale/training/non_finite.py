"""What ends a run early: a loss that is no longer a number."""

from __future__ import annotations

from genscale.errors import UserError
from genscale.parallel.precision import native_precision
from genscale.parallel.processes import on_cpu
from genscale.settings.config import ScheduleSettings, TrainSettings


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite: a matter of settings or data, so one line for the user."""


def calmer(train: TrainSettings, schedule: ScheduleSettings) -> str:
    """What to try with a run of these settings that has become NaN or infinite; nothing that it has already."""
    tries = ["a lower optimizer.lr"]
    if schedule.warmup_steps < train.steps:
        tries.append("a longer schedule.warmup_steps")
    tries.append("a lower train.clip" if train.clip else "train.clip 1")
    safer = {"fp16": native_precision(on_cpu()), "fp8": "bf16", "bf16": "fp32"}.get(train.precision)
    if safer:
        tries.append(f"train.precision {safer} instead of {train.precision}")
    return f"try {', '.join(tries[:-1])}, or {tries[-1]}"
