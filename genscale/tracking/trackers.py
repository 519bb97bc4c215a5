"""The trackers of a run, held so that none of them can stop it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from genscale.config import TrackingSettings
from genscale.tracking.tensorboard_tracker import TensorboardTracker
from genscale.tracking.wandb_tracker import WandbTracker


class Tracker(Protocol):
    """What takes metrics and samples. Any method may raise; `Trackers` sees to it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def log_image(self, step: int, name: str, image: np.ndarray) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class Trackers:
    """Sends metrics and samples to the trackers chosen in `tracking`. To be built on rank 0 only.

    A tracker that fails, at its start or later, is dropped with one warning; training goes on.

    Args:
        settings: the config's `tracking` section.
        run_folder: the run's folder.
        config: the whole resolved config as nested dicts, kept with the W&B run.
        warn: takes the warning, one line.
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
        self._trackers: dict[str, Tracker] = {}
        if settings.wandb != "disabled":
            self._start("wandb", lambda: self._start_wandb(settings, run_folder, config))
        if settings.tensorboard:
            self._start("tensorboard", lambda: TensorboardTracker(run_folder, first_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step, to every tracker. Steps must not go down."""
        self._each(lambda tracker: tracker.log(step, metrics))

    def log_text(self, step: int, name: str, text: str) -> None:
        """A text sample of a step, to every tracker."""
        self._each(lambda tracker: tracker.log_text(step, name, text))

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture of a step, uint8 `(height, width, 3)`, to every tracker."""
        self._each(lambda tracker: tracker.log_image(step, name, image))

    def close(self, exit_code: int = 0) -> None:
        """Finish every tracker. Safe to call twice."""
        self._each(lambda tracker: tracker.close(exit_code))
        self._trackers.clear()

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

    def _start(self, name: str, build: Callable[[], Tracker]) -> None:
        try:
            self._trackers[name] = build()
        except Exception as error:  # whatever it is, it must not cost the run
            self._report(name, error)

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                self._report(name, error, getattr(tracker, "sync", None))
                with contextlib.suppress(Exception):
                    tracker.close(1)  # its threads and files

    def _report(self, name: str, error: Exception, sync: str | None = None) -> None:
        later = f"; `{sync}` uploads later what came before" if sync else ""
        self._warn(f"tracking.{name}: stopped by an error ({_reason(error)}); training goes on and metrics.jsonl holds every "
                   f"metric{later}")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
