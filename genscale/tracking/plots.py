"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from genscale.models.lettering import font_files, missing_letters
from genscale.tracking.metrics_file import read_some_metrics

COLOURS = {"training": "#3b76af", "validation": "#d1602b", "learning_rate": "#4d8f57", "grad_norm": "#8a6bb0"}
PHASES = ("#3b76af", "#b8497a", "#8d8636", "#2f9c98", "#6b6b6b")
RATES = ("-", "--", ":", "-.")
TITLE_LETTERS = 40
"""In a line."""
MOST_POINTS = 10_000
"""Of a curve: of a longer one, so many of its points are read and drawn, more than the picture has columns."""
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


def phases_of(records: list[dict[str, Any]]) -> list[str]:
    """Names of the phases whose losses were logged, in the order they first were; none for a run of one phase."""
    return list(dict.fromkeys(key.removesuffix("/loss") for record in records for key in record if key.endswith("/loss")))


def plot_losses(metrics_path: str | Path, out_png: str | Path, title: str, loss_unit: str = "nats per token") -> None:
    """Draw training and validation loss against the step, and below them learning rate and gradient norm.

    Where a step has several phases, each has a curve of its own, and the validation loss, which is another quantity than any
    of theirs, an axis of its own.

    Args:
        metrics_path: a metrics.jsonl; it may be missing, empty, or hold no validation.
        out_png: where the picture goes; its folder is made.
        title: heading of the picture.
        loss_unit: unit of the validation loss (of one phase's loss, too), for the axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure  # not pyplot: it keeps global state and may look for a display

    records = read_some_metrics(metrics_path, MOST_POINTS)
    phases = phases_of(records)
    apart = bool(phases) and any("validation_loss" in record for record in records)
    figure = Figure(figsize=(8, 7.5 if apart else 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, *between, bottom = figure.subplots(3 if apart else 2, 1, sharex=True, height_ratios=(3, 2, 1.3) if apart else (3, 1))
    _write_title(figure, title)
    training = [(f"{phase}/loss", phase, colour) for phase, colour in zip(phases, cycle(PHASES), strict=False)]
    validation = ("validation_loss", "validation", COLOURS["validation"])
    if apart:
        _draw_losses(top, records, training, "training loss")
        _draw_losses(between[0], records, [validation], f"validation loss\n({loss_unit})")
        between[0].yaxis.label.set_size("small")
    else:
        training = training or [("loss", "training", COLOURS["training"])]
        _draw_losses(top, records, [*training, validation], "training loss" if phases else f"loss ({loss_unit})")
    _draw_rate_and_norm(bottom, records, phases)
    out_png = Path(out_png)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)


def _write_title(figure: Any, title: str) -> None:
    """The name of a run as it is: no formulas between dollars, in fonts that have its letters, in as many lines as it takes."""
    from matplotlib.font_manager import FontProperties, fontManager

    for letter in missing_letters(title):
        title = title.replace(letter, letter.encode("ascii", "backslashreplace").decode())
    families = []
    for file in font_files(title):
        fontManager.addfont(file)
        families.append(FontProperties(fname=file).get_name())
    lines = [title[start : start + TITLE_LETTERS] for start in range(0, len(title), TITLE_LETTERS)]
    plain = set(families) <= {"DejaVu Sans"}
    figure.suptitle("\n".join(lines), fontsize=12, fontweight="bold" if plain else "normal", x=0.02, ha="left",
                    parse_math=False, fontfamily=["DejaVu Sans", *families])


def _draw_losses(axes: Any, records: list[dict[str, Any]], wanted: Sequence[tuple[str, str, str]], heading: str) -> None:
    """Curves of the metrics `wanted`, each as (key, name, colour)."""
    curves = []
    for key, name, colour in wanted:
        steps, values = _series(records, key)
        curves.append(values)
        finite = values[np.isfinite(values)]
        if key != "validation_loss":
            _curve(axes, steps, values, name, noisy=True, color=colour)
        elif values.size:
            best = f", best {finite.min():.4g}" if finite.size else ""
            _curve(axes, steps, values, f"{name}{best}", color=colour, marker="o", markersize=4)
    if limits := robust_limits(curves):
        axes.set_ylim(*limits)
        axes.legend(loc="upper right", framealpha=0.8, edgecolor="none")
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no losses logged", transform=axes.transAxes, ha="center", va="center", color="grey")
    axes.set_ylabel(heading)
    _tidy(axes)


def _draw_rate_and_norm(axes: Any, records: list[dict[str, Any]], phases: Sequence[str]) -> None:
    right = axes.twinx()
    rates = list(dict.fromkeys(key for record in records for key in record if key.split("/")[0] == "learning_rate"))
    rate_styles = [{"color": COLOURS["learning_rate"], "linestyle": style} for style in RATES]
    # A phase's gradient norm has the colour of its loss.
    norms = [f"{phase}/grad_norm" for phase in phases] or ["grad_norm"]
    norm_styles = [{"color": colour} for colour in (PHASES if phases else [COLOURS["grad_norm"]])]
    panels = ((axes, rates, rate_styles, "learning rate"), (right, norms, norm_styles, "gradient norm"))
    for panel, keys, styles, label in panels:
        curves = [_series(records, key) for key in keys]
        limits = robust_limits([values for _, values in curves])
        if limits is None:
            panel.set_yticks([])
        else:
            for key, (steps, values), style in zip(keys, curves, cycle(styles), strict=False):
                _curve(panel, steps, values, key.removeprefix("learning_rate/"), noisy=panel is right, linewidth=1.2, **style)
            # A learning rate is planned, not noisy: all of it is shown.
            top = 1.08 * np.nanmax(np.concatenate([values for _, values in curves])) if panel is axes else limits[1]
            panel.set_ylim(0, top if top > 0 else 1)
        colour = styles[0]["color"] if panel is axes or not phases else "black"
        panel.set_ylabel(label, color=colour)
        panel.tick_params(axis="y", labelcolor=colour)
    if len(rates) > 1:
        axes.legend(loc="upper right", frameon=False, fontsize="small")
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((record["step"] for record in records), default=1) * 1.02 or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    _tidy(axes)
    right.spines["top"].set_visible(False)


def _curve(axes: Any, steps: np.ndarray, values: np.ndarray, label: str, noisy: bool = False, **style: Any) -> None:
    """Draw a curve, if it has a point; a long noisy one pale, with its running median over it."""
    if not values.size:
        return
    if values.size == 1:
        style.setdefault("marker", "o")  # a lone point has no line to see
    style = {"linewidth": 1.6} | style
    if values.size > SMOOTH_FROM and noisy:
        axes.plot(steps, values, **style | {"alpha": 0.3, "linewidth": 0.7})
        width = values.size // 40 | 1
        values, label = _running_median(values, width), f"{label}, running median"
    axes.plot(steps, values, label=label, **style)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
