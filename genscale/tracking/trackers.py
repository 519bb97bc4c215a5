"""The trackers of a run, held so that none of them can stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from genscale.settings.config import TrackingSettings
from genscale.tracking.behind import Behind
from genscale.tracking.tensorboard_tracker import TensorboardTracker
from genscale.tracking.wandb_tracker import WandbTracker


class Tracker(Protocol):
    """What takes metrics and samples. Any method may raise; `Behind` sees to it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def log_image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class Trackers:
    """Sends metrics and samples to the trackers chosen in `tracking`. To be built on rank 0 only.

    Each starts, when it is told to begin, and works in a thread of its own: W&B takes a second to start, and many where its
    server does not answer. One that fails, at its start or later, is dropped with one warning; training goes on.

    Args:
        settings: the config's `tracking` section.
        run_folder: the run's folder.
        config: the whole resolved config as nested dicts, kept with the W&B run.
        warn: takes the warning, one line, from any thread.
        first_step: the step the run starts from (after a resume: the checkpoint's).
    """

    def __init__(
        self,
        settings: TrackingSettings,
        run_folder: str | Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
        first_step: int = 0,
    ) -> None:
        self._warn = warn
        self._trackers: list[Behind] = []
        if settings.wandb != "disabled":
            self._add("wandb", lambda: self._start_wandb(settings, run_folder, config))
        if settings.tensorboard:
            self._add("tensorboard", lambda: TensorboardTracker(run_folder, first_step))

    def begin(self) -> None:
        """Start them, behind what the run does meanwhile. Once more does nothing."""
        for tracker in self._trackers:
            tracker.begin()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, to every tracker. Steps must not go down."""
        metrics = dict(metrics)
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        """A text sample of a step, to every tracker."""
        self._each(lambda tracker: tracker.log_text(step, name, text))

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture of a step, uint8 `(height, width, 3)`, to every tracker."""
        self._each(lambda tracker: tracker.log_image(step, name, image))

    def close(self, exit_code: int = 0) -> None:
        """Finish every tracker. Safe to call twice."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.close(exit_code)

    def _start_wandb(self, settings: TrackingSettings, run_folder: str | Path, config: Mapping[str, Any]) -> WandbTracker:
        """Online where that was asked for and is possible; else offline."""
        if settings.wandb == "online":
            try:
                return WandbTracker(run_folder, config, "online", settings.project, settings.entity)
            except Exception as error:
                reason = _reason(error)
        tracker = WandbTracker(run_folder, config, "offline", settings.project, settings.entity)
        if settings.wandb == "online":
            self._warn(f"tracking.wandb: online is not possible ({reason}); the run goes on offline, and `{tracker.sync}` "
                       "uploads it later")
        return tracker

    def _add(self, name: str, build: Callable[[], Tracker]) -> None:
        self._trackers.append(Behind(build, lambda error, tracker: self._report(name, error, getattr(tracker, "sync", None))))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            tracker.ask(action)

    def _report(self, name: str, error: Exception, sync: str | None = None) -> None:
        later = f"; `{sync}` uploads later what came before" if sync else ""
        self._warn(f"tracking.{name}: stopped by an error ({_reason(error)}); training goes on and metrics.jsonl holds every "
                   f"metric{later}")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
