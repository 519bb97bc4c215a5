"""What an audit has found, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from genscale.objectives.base import Phase

SHOWN = 3  # names in a line; the rest are counted
UNEQUAL = "the processes hold different copies"


@dataclass
class PhaseFindings:
    """What was found of one phase, over all steps of an audit.

    Attributes:
        runs: how often it ran.
        norms: by term, then by network: sum over the runs of the gradient's norm.
        leaks: by network that it does not train: what changed in it.
        total: sum over the runs of the norm of the gradient of all terms together.
    """

    phase: Phase
    runs: int = 0
    norms: dict[str, dict[str, float]] = field(default_factory=dict)
    leaks: dict[str, list[str]] = field(default_factory=dict)
    total: float = 0.0


@dataclass
class AuditReport:
    """What the whole audit has found.

    Attributes:
        heading: what was run.
        steps, samples: how many, over all processes.
        networks: their names.
        whole: gradients by term were measured.
        findings: by phase.
        untrained: by network: its parameters that no phase gave a gradient.
        repeats: of samples, each as text with its step.
        unequal: by network: what the processes hold different copies of.
    """

    heading: str
    networks: Sequence[str]
    whole: bool
    findings: Mapping[str, PhaseFindings]
    steps: int = 0
    samples: int = 0
    untrained: dict[str, list[str]] = field(default_factory=dict)
    repeats: list[str] = field(default_factory=list)
    unequal: dict[str, list[str]] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """Each in a line."""
        found = []
        for name, findings in self.findings.items():
            for network, changed in findings.leaks.items():
                found.append(f"phase {name} trains {findings.phase.network} and changes {network}: {listed(changed)}")
            found += self._reaching(name, findings)
        for network, parameters in self.untrained.items():
            if parameters:
                found.append(f"{network}: no phase gave a gradient in {counted(self.steps, 'step')} to {listed(parameters)}")
        for network, tensors in self.unequal.items():
            if tensors:
                found.append(f"{network}: {UNEQUAL}: {listed(tensors)}; a buffer that forward changes, or a draw that each "
                             "process makes for itself")
        if self.repeats:
            found.append(f"repeated samples: {listed(self.repeats)}; a loader or a data set that repeats itself, or an epoch "
                         "that ends inside the step")
        return found

    def _reaching(self, name: str, findings: PhaseFindings) -> list[str]:
        found, own = [], findings.phase.network
        for term, norms in findings.norms.items():
            if norms[own] == 0:
                found.append(f"phase {name}: term {term} is dead: its gradient in {own} is zero in "
                             f"{counted(findings.runs, 'run')}")
            for network, norm in norms.items():
                if network != own and norm != 0:
                    found.append(f"phase {name} trains {own}, and its term {term} has a gradient in {network}")
        if not self.whole and findings.runs and findings.total == 0:
            found.append(f"phase {name} is dead: its gradient in {own} is zero in {counted(findings.runs, 'run')}")
        return found

    def text(self) -> str:
        """For people."""
        lines = [self.heading]
        for name, findings in self.findings.items():
            lines += ["", f"phase {name} trains {findings.phase.network}", *self._table(findings)]
        faults = self.faults()
        lines += ["", f"{counted(self.samples, 'sample')} in {counted(self.steps, 'step')}; "
                  + (counted(len(faults), "fault") if faults else "no leak, no dead term, no repeated sample")]
        return "\n".join([*lines, *(f"fault: {fault}" for fault in faults)])

    def _table(self, findings: PhaseFindings) -> list[str]:
        if not self.whole:
            return [f"  gradient norm {findings.total / max(findings.runs, 1):.4g} (by term only where weights are whole: "
                    "--parallel.strategy single, ddp, zero1 or zero2)"]
        rows = [["gradient norm", *self.networks]]
        for term, norms in findings.norms.items():
            rows.append([term, *(f"{norms[network] / findings.runs:.4g}" if network == findings.phase.network or norms[network]
                                 else "frozen" for network in self.networks)])
        rows.append(["all, as stepped", *(f"{findings.total / max(findings.runs, 1):.4g}" if network == findings.phase.network
                                          else "" for network in self.networks)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  " + row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in
                                                           zip(row[1:], widths[1:], strict=True)) for row in rows]
        if findings.phase.statistics:
            table.append(f"  no part of the loss: {', '.join(sorted(findings.phase.statistics))}")
        return [line.rstrip() for line in table]


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
