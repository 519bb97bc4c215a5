"""genscale check-family NAME: whether a family keeps genscale's promise, by real runs of a toy of it."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from genscale.printable import printable
from genscale.settings.parser import parse

BROKEN = 1
"""Exit code where a check has failed."""


def parser() -> ArgumentParser:
    """Its flags."""
    made = ArgumentParser(prog="genscale check-family", exit_on_error=False, description=(
        "Check that a family keeps the promise, by runs of 8 steps: initial weights, draws and sums of its losses; one process "
        "against accumulation, every strategy on two processes, and fsdp2 in two groups of two; kill and resume; resize; "
        "weights in bf16; audit; sample; evaluate. A combination that genscale refuses is shown with its reason and is no "
        "failure. Exit code 0: nothing failed; 1: a check failed."))
    made.add_argument("name", type=str, help="Name of the family, as model.family has it.")
    made.add_argument("--config", type=str, default=None, help="YAML file of a run to take the place of the family's own "
                        "tiny one (or of its defaults, where it has none). It must be small: it is trained some 15 times.")
    made.add_argument("--folder", type=str, default=None, help="New folder to keep the runs in (default: they are deleted).")
    return made


def main(arguments: list[str]) -> int:
    """Exit code 0: no check failed; 1: at least one did."""
    parsed = parse(parser(), arguments)
    from genscale.inspection.check_family import BATCH, STEPS, check_family

    print(f"family {parsed.name}: runs of {STEPS} steps of {BATCH} samples, sgd, fp32; two processes but where it says one or "
          "2 x 2", flush=True)
    report = check_family(parsed.name, parsed.config, folder=Path(parsed.folder) if parsed.folder else None,
                          show=lambda check: print(printable(str(check)), flush=True))
    print(report.summary())
    return 0 if report.passed else BROKEN
