"""Which checkpoint of a run is the best, by `train.checkpoint_best`: {"step", "metric", "value"} in state.json, or None."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from genscale.errors import UserError, nearest

Best = dict[str, Any]


def best_of(state: Mapping[str, Any], metric: str) -> Best | None:
    """The best checkpoint that the state of a run knows of, if it was chosen by the metric that chooses now."""
    best = state.get("best")
    if best and "loss" in best:  # as it was kept before there was a choice
        best = {"step": best["step"], "metric": "loss", "value": best["loss"]}
    return best if best and best["metric"] == metric else None


def better_of(best: Best | None, step: int, metric: str, evaluation: Mapping[str, float], higher: bool = False) -> Best | None:
    """The better one of the best so far and that of a step with its evaluation: the lower value, or the higher one."""
    value = evaluation.get(metric, math.nan)
    if math.isfinite(value) and (best is None or (value > best["value"] if higher else value < best["value"])):
        return {"step": step, "metric": metric, "value": value}
    return best


def check_metric(wanted: str, names: Iterable[str]) -> None:
    """Raises UserError where evaluations have no such metric."""
    names = sorted(names)
    if wanted not in names:
        raise UserError(f"train.checkpoint_best: '{wanted}' is no metric of the evaluations, which are {', '.join(names)}"
                        f"{nearest(wanted, names)}")
