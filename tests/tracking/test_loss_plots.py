"""The loss curve must be drawn whatever the metrics hold, and its scale must show the run and not its first step."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from genscale.tracking.metrics_file import MetricsFile
from genscale.tracking.plots import COLOURS, PHASES, _write_title, plot_losses, robust_limits

TRAINING = {"loss": 3.0, "learning_rate": 1e-3, "grad_norm": 1.0}


def _pixels(path, colour: str) -> int:
    """Number of pixels of about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    with Image.open(path) as image:
        return int((np.abs(np.asarray(image.convert("RGB"), dtype=int) - wanted).max(axis=2) < 12).sum())


def _draw(folder, lines, colours=COLOURS) -> dict[str, int]:
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step, record in lines:
        metrics.append(step, record)
    metrics.close()
    plot_losses(folder / "metrics.jsonl", folder / "plots" / "loss.png", "a run")
    return {name: _pixels(folder / "plots" / "loss.png", colour) for name, colour in colours.items()}


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


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning", "error::DeprecationWarning")
@pytest.mark.parametrize("evaluated", [True, False])
def test_each_phase_has_a_curve_and_their_validation_loss_an_axis_of_its_own(tmp_path, evaluated):
    def line(step):
        phases = {"discriminate": 1.3, "generate": 0.8, "regularise": 0.1} if step % 16 == 0 else {"discriminate": 1.3}
        values = {f"{phase}/{key}": level + step / 999 for phase, level in phases.items() for key in ("loss", "grad_norm")}
        return step, {"learning_rate/a": 1e-3, "learning_rate/b": 2e-3} | values

    lines = [line(step) for step in range(1, 101)]
    # Of another unit, a thousand times as large: on the phases' axis it would press them flat.
    lines += [(step, {"validation_loss": 1000.0 + step}) for step in (50, 100)] if evaluated else []
    colours = {"discriminate": PHASES[0], "generate": PHASES[1], "regularise": PHASES[2],
               **{name: COLOURS[name] for name in ("validation", "learning_rate")}}
    drawn = _draw(tmp_path, lines, colours)
    assert (drawn.pop("validation") > 50) == evaluated and min(drawn.values()) > 50
    with Image.open(tmp_path / "plots" / "loss.png") as image:
        assert image.height == (1125 if evaluated else 900)
        picture = np.asarray(image.convert("RGB"), dtype=int)[: 450]
    # The first phase's curve rises by a twelfth of the axis that holds all three: over 15 rows of pixels.
    blue = np.array([int(PHASES[0][i : i + 2], 16) for i in (1, 3, 5)])
    rows = np.flatnonzero((np.abs(picture - blue).max(axis=2) < 12).any(axis=1))
    assert rows.max() - rows.min() > 15


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


@pytest.mark.parametrize(("title", "shown"), [
    ("a $x$ and $\\frac_{$", "a $x$ and $\\frac_{$"),
    ("\u043a\u043e\u0448\u043a\u0430 \U000f0123", "\u043a\u043e\u0448\u043a\u0430 \\U000f0123"),
    ("W" * 100, "\n".join(["W" * 40, "W" * 40, "W" * 20])),
])  # fmt: skip
def test_the_title_is_the_name_of_the_run_without_boxes_or_formulas(title, shown, tmp_path, recwarn):
    figure = Figure(figsize=(8, 6), dpi=150)
    _write_title(figure, title)
    assert figure.get_suptitle() == shown
    figure.savefig(tmp_path / "title.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    pixels = np.asarray(Image.open(tmp_path / "title.png").convert("L"))
    assert (pixels[:, -5:] == 255).all() and (pixels < 100).any()
