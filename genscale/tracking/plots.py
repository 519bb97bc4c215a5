"""The loss curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from genscale.tracking.metrics_file import read_metrics

COLOURS = {"training": "#3b76af", "validation": "#d1602b", "learning_rate": "#4d8f57", "grad_norm": "#8a6bb0"}
NOISY = ("training", "grad_norm")
SMOOTH_FROM = 120
"""With more points than this, a running median is drawn over a noisy curve."""


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, both `(points,)` in fp64; null (NaN or infinite when it was logged) leaves a gap."""
    points = [(record["step"], record[key]) for record in records if key in record]
    values = np.array([(step, np.nan if value is None else value) for step, value in points], dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _running_median(values: np.ndarray, width: int) -> np.ndarray:
    """Centred median over `width` points (an odd number; fewer at the ends), which one spike does not move. Gaps stay gaps."""
    padded = np.pad(values, width // 2, constant_values=np.nan)
    middle = np.full_like(values, np.nan)
    present = np.isfinite(values)
    middle[present] = np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, width)[present], axis=1)
    return middle


def robust_limits(curves: list[np.ndarray]) -> tuple[float, float] | None:
    """Limits of the y axis that hold the curves but for a tall start and lone spikes; None without a finite value.

    Of each curve the first fiftieth (at least one point) is left out, then the highest half percent; of short curves, nothing.
    """
    tops, bottoms = [], []
    for curve in curves:
        finite = curve[np.isfinite(curve)]
        if finite.size:
            late = finite[max(finite.size // 50, 1) :] if finite.size >= 8 else finite
            tops.append(np.quantile(late, 0.995, method="lower") if late.size >= 200 else late.max())
            bottoms.append(finite.min())
    if not tops:
        return None
    bottom, top = min(bottoms), max(tops)
    margin = 0.06 * (top - bottom) or max(abs(top), 1e-12) * 0.1  # a flat curve gets room too
    return float(bottom - margin), float(top + margin)


def plot_losses(metrics_path: str | Path, out_png: str | Path, title: str, loss_unit: str = "nats per token") -> None:
    """Draw training and validation loss against the step, and below them learning rate and gradient norm.

    Args:
        metrics_path: a metrics.jsonl; it may be missing, empty, or hold no validation.
        out_png: where the picture goes; its folder is made.
        title: heading of the picture.
        loss_unit: unit of the loss, for the axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure  # not pyplot: it keeps global state and may look for a display

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.02, ha="left")
    _draw_losses(top, records, loss_unit)
    _draw_rate_and_norm(bottom, records)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


def _draw_losses(axes: Any, records: list[dict[str, Any]], unit: str) -> None:
    steps, losses = _series(records, "loss")
    checked, validation = _series(records, "validation_loss")
    if losses.size:
        _curve(axes, steps, losses, "training", "training")
    if validation.size:
        finite = validation[np.isfinite(validation)]
        best = f", best {finite.min():.4g}" if finite.size else ""
        _curve(axes, checked, validation, "validation", f"validation{best}", marker="o", markersize=4)
    if limits := robust_limits([losses, validation]):
        axes.set_ylim(*limits)
        axes.legend(loc="upper right", frameon=False)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no losses logged", transform=axes.transAxes, ha="center", va="center", color="grey")
    axes.set_ylabel(f"loss ({unit})")
    _tidy(axes)


def _draw_rate_and_norm(axes: Any, records: list[dict[str, Any]]) -> None:
    right = axes.twinx()
    for panel, key, label in ((axes, "learning_rate", "learning rate"), (right, "grad_norm", "gradient norm")):
        steps, values = _series(records, key)
        limits = robust_limits([values])
        if limits is None:
            panel.set_yticks([])
        else:
            _curve(panel, steps, values, key, label, linewidth=1.2)
            # A learning rate is planned, not noisy: all of it is shown.
            top = 1.08 * np.nanmax(values) if key == "learning_rate" else limits[1]
            panel.set_ylim(0, top if top > 0 else 1)
        panel.set_ylabel(label, color=COLOURS[key])
        panel.tick_params(axis="y", labelcolor=COLOURS[key])
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((record["step"] for record in records), default=1) * 1.02 or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _tidy(axes)
    right.spines["top"].set_visible(False)


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray, key: str, label: str, **style: Any) -> None:
    """Draw a curve; a long noisy one pale, with its running median over it."""
    if values.size == 1:
        style.setdefault("marker", "o")  # a lone point has no line to see
    style = {"color": COLOURS[key], "linewidth": 1.6} | style
    if values.size > SMOOTH_FROM and key in NOISY:
        axes.plot(steps, values, **style | {"alpha": 0.3, "linewidth": 0.7})
        width = values.size // 40 | 1
        values, label = _running_median(values, width), f"{label}, median of {width} logged steps"
    axes.plot(steps, values, label=label, **style)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
