"""genscale compare RUN_A RUN_B: the first step at which two runs differ, and in what."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from genscale.printable import printable
from genscale.settings.parser import parse

if TYPE_CHECKING:
    from genscale.inspection.comparison import Comparison

DIFFERENT = 1
SHOWN = 12  # differences of the first step that differs


def main(arguments: list[str]) -> int:
    """Exit code 0: equal, or equal but for rounding; 1: different."""
    parsed = parse(parser(), arguments)
    from genscale.inspection.comparison import compare_runs

    comparison = compare_runs(Path(parsed.run_a), Path(parsed.run_b))
    print(json.dumps(_as_json(comparison), indent=1, allow_nan=False) if parsed.json else _as_text(comparison))
    return 0 if comparison.alike else DIFFERENT


def parser() -> ArgumentParser:
    """The flags of the verb."""
    flags = ArgumentParser(prog="genscale compare", exit_on_error=False, description=(
        "Name the first step at which two runs differ, and in what: settings, samples, draws, gradients, weights, learning "
        "rate. Runs with run.trace true are compared step by step and tensor by tensor, others by metrics.jsonl; then "
        "checkpoints of equal steps. Exit code 0: equal, or equal but for rounding; 1: different."))
    flags.add_argument("run_a", type=str, help="A run folder.")
    flags.add_argument("run_b", type=str, help="Another.")
    flags.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    return flags


def _as_text(comparison: Comparison) -> str:
    lines = [f"settings: {'equal' if not comparison.config else ''}".rstrip()]
    width = max(map(len, comparison.config), default=0)
    lines += [f"  {key:<{width}}  {a} | {b}" for key, (a, b) in comparison.config.items()]
    lines.append(f"{comparison.source}: {comparison.compared} steps in common")
    lines += [f"  step {each.step}: {each.what}" for each in comparison.all[:SHOWN]]
    if len(comparison.all) > SHOWN:
        lines.append(f"  step {comparison.all[0].step}: and {len(comparison.all) - SHOWN} more")
    if comparison.checkpoints:
        steps = ", ".join(map(str, comparison.checkpoints))
        what = f"step {comparison.checkpoint.step}: {comparison.checkpoint}" if comparison.checkpoint else f"equal at {steps}"
        lines.append(f"checkpoints: {what}")
    return "\n".join(map(printable, [*lines, comparison.verdict]))


def _as_json(comparison: Comparison) -> dict[str, Any]:
    plain = dataclasses.asdict(comparison)
    return _finite({**plain, "alike": comparison.alike, "verdict": comparison.verdict})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
