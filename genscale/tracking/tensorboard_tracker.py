"""TensorBoard event files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from genscale.writing import refuse_link

FLUSH_SECONDS = 10
"""A killed run loses at most the events of this long."""


class TensorboardTracker:
    """Writes scalars, text and pictures to `<run folder>/tensorboard`.

    Args:
        run_folder: the run's folder.
        first_step: the step that this run starts from; what an interrupted run logged beyond it is hidden by TensorBoard.

    Raises:
        ImportError: tensorboard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, run_folder: str | Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and tensorboard may be absent

        folder = Path(run_folder) / "tensorboard"
        refuse_link(folder)
        purge_step = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """A sample; indented, since TensorBoard shows Markdown and would else run the lines together."""
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda line: True), step)

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 `(height, width, 3)`."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self, exit_code: int = 0) -> None:
        """Write out what is queued. Event files keep no exit code."""
        self._writer.close()
