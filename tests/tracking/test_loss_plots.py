"""The loss curve must be drawn whatever the metrics hold, and its scale must show the run and not its first step."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from genscale.tracking.metrics_file import MetricsFile
from genscale.tracking.plots import COLOURS, plot_losses, robust_limits

TRAINING = {"loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0}


def _pixels(path, colour: str) -> int:
    """Number of pixels of about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    with Image.open(path) as image:
        return int((np.abs(np.asarray(image.convert("RGB"), dtype=int) - wanted).max(axis=2) < 12).sum())


def _draw(folder, lines) -> dict[str, int]:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step, record in lines:
        metrics.append(step, record)
    metrics.close()
    plot_losses(folder / "metrics.jsonl", folder / "plots" / "loss.png", "a run")
    return {name: _pixels(folder / "plots" / "loss.png", colour) for name, colour in COLOURS.items()}


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning", "error::DeprecationWarning")
def test_each_curve_is_drawn_when_its_metric_is_there(tmp_path):
    run = [(step, TRAINING | {"loss": 1 + 9 / step, "learning_rate": 1e-3 / step}) for step in range(1, 201)]
    drawn = _draw(tmp_path, [*run, (100, {"validation_loss": 1.5}), (200, {"validation_loss": float("nan")})])
    assert min(drawn.values()) > 50
    (tmp_path / "other").mkdir()
    drawn = _draw(tmp_path / "other", run)
    assert drawn["validation"] == 0 and drawn["training"] > 50


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning", "error::DeprecationWarning")
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [(1, TRAINING)],
        [(0, TRAINING | {"learning_rate": 0.0})],
        [(5, {"validation_loss": 2.0})],
        [(1, {"loss": float("nan")})],
    ],
    ids=["no lines", "one line", "step 0", "only validation", "only nan"],
)
def test_short_runs_are_drawn_too(tmp_path, lines):
    drawn = _draw(tmp_path, lines)
    finite = {key for _, record in lines for key, value in record.items() if np.isfinite(value)}
    assert (drawn["training"] > 20) == ("loss" in finite)
    assert (drawn["validation"] > 20) == ("validation_loss" in finite)


def test_a_missing_file_is_drawn_as_an_empty_plot(tmp_path):
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "nothing yet")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1200, 900)


def test_limits_leave_out_the_first_steps_and_lone_spikes():
    curve = 2 + np.exp(-np.arange(1000) / 200)
    curve[:10] += 50
    curve[500] += 50
    low, high = robust_limits([curve, np.array([2.2, 2.1])])
    assert low < 2.01 and 2.9 < high < 3.2
    assert robust_limits([np.array([np.nan]), np.array([])]) is None
    low, high = robust_limits([np.array([5.0, 1.0])])  # short: everything is shown
    assert low < 1 and high > 5
