"""What `genscale check-family` shows: a row a check, and whether nothing has failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from genscale.errors import UserError
from genscale.inspection.audit_report import counted, listed
from genscale.inspection.checkpoint_comparison import compare_checkpoints
from genscale.inspection.comparison import ROUNDING, Comparison, compare_runs

State = Literal["ok", "refused", "failed", "left out"]


@dataclass(frozen=True)
class Check:
    """One row.

    Attributes:
        name: what was asked.
        state: ok, failed; refused, where genscale says itself that the combination is not possible; left out, where the family
            has no such thing.
        figure: what was measured, or the reason.
    """

    name: str
    state: State
    figure: str

    def __str__(self) -> str:
        return f"  {self.name:<25}{self.state:<10}{self.figure}"


@dataclass(frozen=True)
class FamilyReport:
    """All rows.

    Attributes:
        seconds: how long it took.
    """

    family: str
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        """Nothing has failed."""
        return all(check.state != "failed" for check in self.checks)

    def summary(self) -> str:
        """The last line."""
        counts = {state: sum(check.state == state for check in self.checks) for state in get_args(State)}
        told = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
        return (f"family {self.family} {'keeps' if self.passed else 'BREAKS'} the promise: {told} of "
                f"{counted(len(self.checks), 'check')}, in {self.seconds:.0f} s")


def same_run(title: str, one: Path, other: Path) -> Check:
    """A row that says whether two run folders hold the same run but for rounding."""
    try:
        comparison: Comparison = compare_runs(one, other)
    except UserError as error:
        return Check(title, "failed", str(error))
    if comparison.beyond is not None:
        return Check(title, "failed", comparison.verdict)
    steps, apart = compare_checkpoints(one / "checkpoints", other / "checkpoints")
    equal = f"weights equal to the bit at {listed([str(step) for step in steps])}"
    weights = f"{apart.of} of step {apart.step} within {apart.relative:.0e}" if apart else equal
    if apart is not None and apart.relative > 100 * ROUNDING["fp32"]:
        return Check(title, "failed", f"losses agree, and the checkpoints do not: {apart}")
    return Check(title, "ok", f"losses within {comparison.largest:.1e} over {counted(comparison.compared, 'step')}, {weights}")


def row_of(title: str, faults: list[str], fine: str) -> Check:
    """A row of the faults that were found; where there is none, it says `fine`."""
    return Check(title, "failed", listed(faults)) if faults else Check(title, "ok", fine)
