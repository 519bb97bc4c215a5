"""The clock of `genscale plan` against published runs: its constants are fitted on some, and judged on others.

    python benchmarks/plan_anchors.py --out benchmarks/results/plan-anchors.json
    python benchmarks/plan_anchors.py --anchors MORE.json --judge     on rows with held_out: true, which nothing is fitted on

Of a step's time the constants are five a kind of GPU. Two questions are asked of each published GPT run:
- calibrated: what if others of the same source and GPU are known? Where a source has many, the constants are fitted on two
  thirds of its shapes and judged on the third, in turns; where it has few, one run gives one factor for the others.
- uncalibrated: what if nothing of the source is known? Constants fitted on all other sources of the kind of GPU. (from few
  rows: of the one large source, whose GPUs are hardly known without it.)
StyleGAN runs are judged by their scaling: the published step of one GPU, and the exchange that more of them add.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from genscale.errors import UserError
from genscale.planning.account import Exchange, Machine
from genscale.planning.profiles import profile
from genscale.planning.time import exchange_seconds, time_of
from plan_shapes import compiled, machine_of, profile_of, step_of
from report import circumstances, write

import numpy as np
from scipy.optimize import minimize

ANCHORS = Path(__file__).parent / "data" / "plan-anchors.json"
BOUNDS = {"product": (0.4, 1.0), "half": (50.0, 1500.0), "attention": (0.1, 1.0), "memory": (0.5, 1.0), "exposed": (0.0, 1.0)}
"""What a device can be: no elementwise kernel of some size leaves more than half of the bandwidth unused."""
USUAL = (0.78, 200.0, 0.3, 0.7, 0.6)
"""What the constants are where no row says otherwise: what few rows leave open stays near it."""
MANY = 12
"""Rows of one source and kind of GPU that constants can be fitted on."""
ENOUGH = 40
"""Rows of other sources from which a kind of GPU is known, as the shipped constants know it."""
FOLDS = 3
LEFT_OUT = {"nanoGPT README": "measured in January 2023, with attention in the open",
            "Megatron-LM tests": "shows a network of 40 M parameters wait for its launches, by a host nobody describes"}
PARAMETERS = {"stylegan2": 59e6, "stylegan3-t": 51e6, "stylegan3-r": 45e6}
"""Of generator and discriminator, at 512 and 1024 pixels (their papers' configurations F, T and R)."""

SOURCES = ("Megatron-LM tests", "nanoGPT README", "nanoGPT PR", "llm.c", "modded-nanogpt", "fms-fsdp", "torchtune",
           "torchtitan", "llm-foundry", "picotron", "stylegan2-ada", "stylegan3")

Constants = dict[str, float]
Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """All rows, each with its source's name and stack: of a file that says these once, or of a list whose rows say them each,
    of which those are left out that train in ways that genscale has not (`in_scope`)."""
    content = json.loads(path.read_text())
    if isinstance(content, list):
        return [row for row in content if row.get("in_scope", True)]
    return [{**row, **content["sources"][row["source"]]} for row in content["rows"]]


def measured(row: Row) -> float | None:
    """Seconds of a step; None where none can be told."""
    found = row["measured"]
    if "tokens_per_s_gpu" in found and row.get("micro_batch"):
        return row["micro_batch"] * row["seq"] * (row.get("accumulation") or 1) / found["tokens_per_s_gpu"]
    return found.get("step_time_s")


def is_known(row: Row) -> bool:
    """Whether there is a profile of its GPU."""
    try:
        return bool(profile_of(row))
    except UserError:
        return False


def is_judged(row: Row) -> bool:
    """Whether its step is told from its shape."""
    return row["family"] == "gpt" and is_known(row) and measured(row) is not None and source(row) not in LEFT_OUT


def source(row: Row) -> str:
    """In a word or two."""
    return next((each for each in SOURCES if each in row["source"]), row["source"])


def kind(row: Row) -> str:
    """Whose constants a GPU has."""
    return "h100" if row["gpu"].startswith("h") else profile_of(row).name


# --- predicting and fitting ----------------------------------------------------------------------------------------------


@cache
def _asked(text: str) -> tuple[Any, ...]:
    row = json.loads(text)
    return step_of(row), machine_of(row), profile_of(row), row["precision"].removesuffix("-pure"), compiled(row)


def predicted(row: Row, constants: Constants | None = None) -> float:
    """Seconds of a step; without constants, with those that are shipped."""
    step, machine, gpu, precision, fused = _asked(json.dumps(row))
    return time_of(step, machine, replace(gpu, **(constants or {})), precision, fused).step


def errors(rows: Sequence[Row], constants: Constants | None = None) -> np.ndarray:
    """Relative, of the step's time: above 0 a run is faster than was told."""
    return np.array([predicted(row, constants) / measured(row) - 1 for row in rows])


def fit(rows: Sequence[Row]) -> Constants:
    """The constants with the least mean of absolute and of squared errors (in logarithms), which stay near the usual ones where
    nothing pulls them away; a source weighs as the root of its rows, for one with a hundred of them is still one stack."""
    sources = [(source(row), compiled(row)) for row in rows]
    weights = np.array([sources.count(each) ** -0.5 for each in sources])
    weights /= weights.sum()
    low, high = np.array(list(BOUNDS.values())).T

    def constants(point: np.ndarray) -> Constants:
        return dict(zip(BOUNDS, map(float, np.clip(low + (high - low) * point, low, high)), strict=True))

    def loss(point: np.ndarray) -> float:
        logs = np.log1p(errors(rows, constants(point)))
        outside = np.maximum(0, -point).sum() + np.maximum(0, point - 1).sum()
        pull = ((point - start) ** 2).sum() / len(rows)
        return float(weights @ np.abs(logs) + 0.3 * (weights @ logs**2) ** 0.5 + outside + pull)

    start = (np.array(USUAL) - low) / (high - low)
    simplex = np.vstack([start, *(start + np.where(start > 0.5, -0.25, 0.25)[each] * np.eye(5)[each] for each in range(5))])
    found = minimize(loss, start, method="Nelder-Mead", options={"maxfev": 400, "initial_simplex": simplex})
    return {name: float(f"{value:.4g}") for name, value in constants(found.x).items()}


# --- judging -------------------------------------------------------------------------------------------------------------


def calibrated(rows: Sequence[Row]) -> dict[str, float]:
    """Errors by row, each told from others of its source, kind of GPU and (where they are few) compiler."""
    found: dict[str, float] = {}
    many = groups(rows, lambda row: (source(row), kind(row), row["precision"]))
    for those in [those for those in many if len(those) >= MANY]:
        shapes = sorted({json.dumps(row["model"]) + str(row["seq"]) for row in those})
        for fold in range(FOLDS):
            out = set(shapes[fold::FOLDS])
            test = [row for row in those if json.dumps(row["model"]) + str(row["seq"]) in out]
            constants = fit([row for row in those if row not in test])
            found |= zip((row["id"] for row in test), errors(test, constants), strict=True)
    few = groups([row for row in rows if row["id"] not in found],
                 lambda row: (source(row), row["gpu"], row["precision"], compiled(row)))
    for first, *others in few:
        factor = 1 + errors([first])[0]
        found |= {row["id"]: (1 + error) / factor - 1 for row, error in zip(others, errors(others), strict=True)}
    return found


def uncalibrated(rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """Errors by row, each told from the other sources of its kind of GPU (of the 40 GB A100, which has one source, from the
    other A100's): where those have enough rows, and where they have but a few."""
    enough, few = {}, {}
    for those in groups(rows, lambda row: (source(row), kind(row))):
        name, gpu = source(those[0]), kind(those[0]).removesuffix("-40")
        others = [row for row in rows if kind(row).removesuffix("-40") == gpu and source(row) != name]
        found = enough if len(others) >= ENOUGH else few
        found |= zip((row["id"] for row in those), errors(those, fit(others)), strict=True)
    return enough, few


def groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def scaling(rows: Sequence[Row]) -> dict[str, float]:
    """Errors of the steps of StyleGANs on several GPUs, told from the step of one with the same micro-batch: so many
    micro-batches, and the sum of all gradients over NVLink, which these programs do not hide."""
    found: dict[str, float] = {}
    gans = [row for row in rows if row["model"].get("kind", "").startswith("stylegan")]
    for those in groups(gans, lambda row: (row["source"], row["gpu"], json.dumps(row["model"]), row["micro_batch"])):
        ones = [row for row in those if row["gpus"] == 1]
        for row in those if ones else []:
            if row["gpus"] > 1:
                alone = _step_of_images(ones[0]) / ones[0]["accumulation"]
                gpu = profile("v100" if row["gpu"] == "v100" else "a100-40")
                size = int(4 * PARAMETERS[row["model"]["kind"]])
                exchange = Exchange("all_reduce", "", "backward", size, row["gpus"], True, False, 1)
                told = alone * row["accumulation"] + exchange_seconds(exchange, Machine(gpu.name, row["gpus"], 8), gpu)
                found[row["id"]] = told / _step_of_images(row) - 1
    return found


def _step_of_images(row: Row) -> float:
    return row["measured"]["s_per_kimg"] * row["batch"] / 1000


def judged(known: Sequence[Row], held_out: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Errors of rows that nothing was fitted on: by the constants that are shipped, and calibrated by known rows of the same
    source; of StyleGANs the scaling, whose step on one GPU may be a known one."""
    test = [row for row in held_out if is_judged(row)]
    found = {"shipped": dict(zip((row["id"] for row in test), errors(test), strict=True)), "calibrated": dict[str, float]()}

    def alike(row: Row) -> tuple[Any, ...]:
        return source(row), kind(row), row["precision"]

    for those in groups(test, alike):
        others = [row for row in known if is_judged(row) and alike(row) == alike(those[0])]
        if len(others) >= MANY:
            found["calibrated"] |= zip((row["id"] for row in those), errors(those, fit(others)), strict=True)
    kept = {row["id"] for row in held_out}
    found["scaling"] = {name: error for name, error in scaling([*known, *held_out]).items() if name in kept}
    return {name: each for name, each in found.items() if each}


def summary(values: Iterable[float]) -> dict[str, Any]:
    sizes = np.abs(np.array(list(values)))
    found = {"median": np.median(sizes), "nine_in_ten": np.quantile(sizes, 0.9), "within_10": (sizes <= 0.1).mean(),
             "within_20": (sizes <= 0.2).mean()}
    return {"rows": len(sizes), **{name: round(float(value), 4) for name, value in found.items()}}


def table(rows: Sequence[Row], found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Errors by what was known, and by source, GPU, strategy and precision."""
    by = {row["id"]: row for row in rows}
    views: dict[str, Callable[[Row], str]] = {
        "all": lambda row: row["family"], "source": source, "gpu": lambda row: f"{row['gpu']} {row['gpu_mem_gib']} GB",
        "strategy": lambda row: row["strategy"], "precision": lambda row: row["precision"],
        "compiled": lambda row: str(compiled(row))}
    return [{"known": known, "by": view, "of": name, **summary(errors_of[row["id"]] for row in those)}
            for known, errors_of in found.items() for view, key in views.items()
            for those in groups((by[each] for each in errors_of), key) for name in [key(those[0])]]


def show(lines: Sequence[dict[str, Any]]) -> None:
    print(f"{'known':14}{'by':11}{'':20}{'rows':>5}{'median':>9}{'9 in 10':>9}{'<= 10 %':>9}{'<= 20 %':>9}")
    for line in lines:
        print(f"{line['known']:14}{line['by']:11}{line['of'][:19]:20}{line['rows']:5}{line['median']:9.1%}{line['nine_in_ten']:9.1%}"
              f"{line['within_10']:9.0%}{line['within_20']:9.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=Path, default=ANCHORS)
    parser.add_argument("--judge", action="store_true",
                        help="on held-out rows, by the shipped constants and by known rows of the same source")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = load(asked.anchors)
    if asked.judge:
        test = [row for row in rows if row.get("held_out")]
        fitted_on = {row["id"] for row in load(ANCHORS)} - {row["id"] for row in test}
        if not test:
            raise SystemExit(f"--judge: no row of {asked.anchors} is held out; name a file of rows with held_out: true")
        found = judged([row for row in load(ANCHORS) if row["id"] in fitted_on], test)
        lines = table(test, found)
        show(lines)
        if asked.out:
            write({**circumstances(["torch", "scipy"]), "errors": lines}, asked.out)
        return
    known = [row for row in rows if not row.get("held_out")]
    gpts = [row for row in known if is_judged(row)]
    fitted = {gpu: fit([row for row in gpts if kind(row) == gpu]) for gpu in ("a100", "a100-40", "h100")}
    shipped = {row["id"]: float(errors([row], fitted[kind(row)])[0]) for row in gpts}
    enough, few = uncalibrated(gpts)
    found = {"fitted": shipped, "calibrated": calibrated(gpts), "uncalibrated": enough, "from few rows": few,
             "scaling": scaling(known)}
    lines = table(known, found)
    show(lines)
    write({**circumstances(["torch", "scipy"]), "constants": fitted, "left_out": LEFT_OUT, "errors": lines,
           "by_row": {known: {name: round(float(error), 4) for name, error in each.items()} for known, each in found.items()}},
          asked.out)


if __name__ == "__main__":
    main()
