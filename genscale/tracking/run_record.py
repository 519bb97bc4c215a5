"""What is kept of a run for people to see, in its folder and elsewhere, while it goes."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genscale.settings.config import Config
from genscale.tracking.metrics_file import MetricsFile
from genscale.tracking.plots import plot_losses
from genscale.tracking.progress import Progress
from genscale.tracking.trackers import Trackers
from genscale.tracking.writes import Writes
from genscale.writing import clear_drafts, drafted, write_whole

log = logging.getLogger("genscale")


class RunRecord:
    """metrics.jsonl, samples, trackers, progress and, at the end, the loss curve. To be built on rank 0 only.

    Args:
        folder: of the run.
        resolved: the whole config as nested dicts, for the trackers.
        unit: what speed counts.
        done: the step that the run goes on from; what an earlier life of the run wrote of later ones is dropped.
        writes: how to write what the run can do without.

    Raises:
        OSError: metrics.jsonl cannot be written.
        UserError: it is damaged.
    """

    def __init__(self, folder: Path, config: Config, resolved: Mapping[str, Any], unit: str, done: int, writes: Writes) -> None:
        self.folder, self.name, self._writes = folder, config.run.name, writes
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._metrics.truncate_after(done)
        self._trackers = Trackers(config.tracking, folder, resolved, warn=log.warning, first_step=done)
        if config.tracking.wandb == "offline":
            log.info("W&B is offline: `genscale sync %s` uploads the run, from a machine with internet", folder)
        self._progress = Progress(config.train.steps, done, unit)
        self._past_first = False

    def step(self, step: int) -> None:
        """The step is done."""
        self._progress.update(step)
        if self._past_first:  # which shows whether a run goes well, and is waited for
            self._trackers.begin()
        self._past_first = True

    def write(self, step: int, line: Mapping[str, Any], show: Mapping[str, float] | None = None) -> None:
        """The metrics of a step.

        Args:
            show: what to show beside them as progress; None: show nothing.
        """
        self._writes.attempt("metrics.jsonl", lambda: self._metrics.append(step, line))
        numbers = {key: value for key, value in line.items() if key != "data_digest"}
        self._trackers.log(step, numbers)
        if show is not None:
            self._progress.update(step, {**numbers, **show})

    def rolled_back(self, step: int) -> None:
        """The run goes on from that step: what follows it will be written again."""
        self._writes.attempt("metrics.jsonl", lambda: self._metrics.truncate_after(step))

    def evaluated_anew(self, step: int) -> None:
        """The step is about to be evaluated, as it may have been in a life that was killed before its next checkpoint."""
        def before(record: Mapping[str, Any]) -> bool:
            return record["step"] == step and any(name.startswith("validation_") for name in record)

        self._writes.attempt("metrics.jsonl", lambda: self._metrics.drop(before, since=step))

    def sample(self, step: int, file: Path, sample: str | np.ndarray) -> None:
        """A text, or a picture, uint8 `(height, width, 3)`."""
        self._writes.attempt("samples", lambda: write_whole(file, sample if isinstance(sample, str) else _as_png(sample)))
        if isinstance(sample, str):
            self._trackers.log_text(step, "sample", sample)
        else:
            self._trackers.log_image(step, "sample", sample)

    def close(self, failed: bool, loss_unit: str) -> None:
        """The run has ended."""
        self._progress.close()
        self._writes.attempt("metrics.jsonl", self._metrics.close)
        if not failed:  # else a later life may have the folder, and draw there
            for name in ("plots", "samples"):  # of lives that were killed, one on a node that was cut off perhaps
                clear_drafts(self.folder / name)
        try:
            with drafted(self.folder / "plots" / "loss.png") as picture:
                plot_losses(self.folder / "metrics.jsonl", picture, title=self.name, loss_unit=loss_unit)
        except Exception as error:  # a picture is never worth a run
            log.warning("no loss curve: %s", error)
        self._trackers.close(exit_code=int(failed))


def _as_png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="png")
    return content.getvalue()
