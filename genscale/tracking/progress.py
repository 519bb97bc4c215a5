"""What a person sees while a run goes: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Least time between two plain lines."""
LONGEST = 1e12
"""Seconds that are said of what is left, 31,700 years."""
BAR_FORMAT = "step {n_fmt}/{total_fmt} |{bar}|{desc}  {remaining} left"
BAR_COLUMNS = 24
"""Columns of the bar without the numbers of steps and the description, with the least of a bar."""


def figure(value: float) -> str:
    """A count as the whole number it is; any other with four decimals, or in powers of ten where those would not show it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e9 else f"{value:.4g}"


def describe(metrics: Mapping[str, float | None], unit: str, width: int | None = None) -> str:
    """The metrics a person watches, in one line: losses, learning rate, gradient norm, speed; those that are there.

    Of several phases: the loss of each by its name, the latest validation score (`validation_<name>` or `validation`), speed,
    learning rates.

    Args:
        unit: what speed counts.
        width: of several phases, leave out at the end what does not fit into so many columns.
    """
    if any(name.endswith("/loss") for name in metrics):
        return _describe_phases(metrics, unit, width)
    parts = [f"{name} {figure(value)}" for name, value in metrics.items() if name.endswith("loss") and value is not None]
    speed = "{:,.0f} " + f"{unit}/s"
    for name, text in (("learning_rate", "lr {:.1e}"), ("grad_norm", "grad {:.2f}"), (f"{unit}_per_second", speed)):
        if metrics.get(name) is not None:
            parts.append(text.format(metrics[name]))
    return "  ".join(parts)


def _describe_phases(metrics: Mapping[str, float | None], unit: str, width: int | None) -> str:
    losses = [(name.removesuffix("/loss"), value) for name, value in metrics.items() if name.endswith("/loss")]
    scores = [(name.removeprefix("validation_"), value) for name, value in metrics.items() if name.startswith("validation")]
    parts = [f"{name} {_short(value)}" for name, value in [*losses, *scores] if value is not None]
    if (speed := metrics.get(f"{unit}_per_second")) is not None:
        parts.append(f"{speed:,.0f} {unit}/s")
    rates = [f"{value:.1e}" for name, value in metrics.items() if name.split("/")[0] == "learning_rate" and value is not None]
    if rates:
        parts.append(f"lr {' '.join(rates)}")
    while len(parts) > 1 and width is not None and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)


def _short(value: float) -> str:
    """Three digits, without an exponent where it can be."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _columns() -> int:
    """Columns of the terminal; 0 where there is none, not any more, or one (a container's, a recorder's) without a width."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    except (OSError, ValueError):
        return 0


class Progress:
    """Shows progress on stderr. To be built right before the first step, for the time left is reckoned from there.

    Args:
        total_steps: the step at which the run ends.
        first_step: steps already done (after a resume).
        unit: what speed counts, in the plural; the metric `<unit>_per_second` is shown.
    """

    def __init__(self, total_steps: int, first_step: int = 0, unit: str = "tokens") -> None:
        self._total, self._first, self._unit = total_steps, first_step, unit
        self._start = time.monotonic()
        self._printed: float | None = None  # when the last plain line was printed
        self._pending: str | None = None  # the latest line that was held back
        self._bar = None
        if _columns():
            self._bar = tqdm(total=total_steps, initial=first_step, file=sys.stderr, bar_format=BAR_FORMAT, dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float | None] | None = None) -> None:
        """`step` steps are done. With metrics: show them, on the bar or as a line (the first, the last, and one each
        `LINE_SECONDS` between); without: move the bar only."""
        if self._bar is not None:
            if metrics:
                shown = {name: value for name, value in metrics.items() if name != "grad_norm"}  # 80 columns hold no more
                width = _columns() - BAR_COLUMNS - 2 * len(str(self._total))
                self._bar.set_description_str(f" {describe(shown, self._unit, width)}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif metrics:
            self._pending = f"step {step}/{self._total}  {describe(metrics, self._unit)}  {self._left(step)} left"
            now = time.monotonic()
            if self._printed is None or now - self._printed >= LINE_SECONDS or step >= self._total:
                self._printed = now
                self._print_pending()

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it stands; print the last logged step if it was held back. Safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        self._print_pending()

    def _print_pending(self) -> None:
        if self._pending is not None:
            self.write(self._pending)
            self._pending = None

    def _left(self, step: int) -> timedelta:
        # Wall time, so evaluation and checkpoints count: that is how long the person waits.
        seconds = (time.monotonic() - self._start) / max(step - self._first, 1) * max(self._total - step, 0)
        return timedelta(seconds=round(min(seconds, LONGEST)))
