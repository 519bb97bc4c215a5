"""A profiler trace of a few steps: what the device did, and where the host made it wait."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from genscale.hook import Hook, Order, StepReport
from genscale.writing import drafted, make_folder, write_whole

log = logging.getLogger("genscale")
WARM_UP = 10  # steps: memory pools have grown, kernels are compiled and tuned
ROWS = 60


class Profile(Hook):
    """Traces `steps` steps of this process with torch.profiler, and changes no result.

    After ten steps, or as many of them as the run leaves room for (at least one), writes to `folder` trace.json.gz (for
    ui.perfetto.dev or chrome://tracing) and table.txt (operations by their own time, on the device where there is one).

    Args:
        remaining: steps that this run will still make.
    """

    name, order, settled = "profile", Order.PROFILE, False

    def __init__(self, folder: Path, steps: int, remaining: int) -> None:
        self.folder, self.steps = folder, min(steps, max(1, remaining - 1))
        skipped = min(WARM_UP, remaining - self.steps)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        warm_up = min(1, skipped)
        self._profiler: profile | None = profile(
            activities=activities, acc_events=True, on_trace_ready=self._write,
            schedule=schedule(wait=skipped - warm_up, warmup=warm_up, active=self.steps, repeat=1))
        self._profiler.start()
        self._left = skipped + self.steps

    def step(self, report: StepReport) -> None:
        """After each step of the run."""
        if self._profiler is None:
            return
        self._profiler.step()
        self._left -= 1
        if self._left == 0:
            self.close()

    def close(self, failed: bool = False) -> None:
        """A run that ends early leaves the trace of the steps it made."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _write(self, profiler: profile) -> None:
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            make_folder(self.folder)
            with drafted(self.folder / "trace.json.gz") as trace:
                profiler.export_chrome_trace(str(trace))
            write_whole(self.folder / "table.txt", profiler.key_averages().table(sort_by=order, row_limit=ROWS) + "\n")
        except OSError as error:
            log.warning("profile could not be written: %s; training goes on", error.strerror or error)
