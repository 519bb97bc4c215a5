"""What `genscale doctor` finds out: one `Check` for each thing it looks at, on each node."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from genscale.errors import UserError
from genscale.masking import masked

State = Literal["ok", "warning", "failure"]
STATES: tuple[State, ...] = ("ok", "warning", "failure")
"""From the best to the worst."""


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Attributes:
        name: of the thing, as in "open files"; the same on every node.
        state: ok; warning (the run goes on, slower or with less); failure (it would not start, or not get far).
        found: what was seen, in a line.
        remedy: what to do about it; empty where it is ok.
        host: the node it was seen on; empty for what is no node's own matter.
        of_node: a failure is this node's fault, and another node would do better.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    host: str = ""
    of_node: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON, without passwords and tokens."""
        return {key: masked(value) if isinstance(value, str) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Check:
        """What `as_dict` gave."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})


def worst(checks: Iterable[Check]) -> State:
    """The worst state among them; ok where there are none."""
    return max((check.state for check in checks), key=STATES.index, default="ok")


def bad_nodes(checks: Iterable[Check]) -> list[str]:
    """Nodes at fault: a job that is put back into the queue should not get them again."""
    return sorted({check.host for check in checks if check.state == "failure" and check.of_node and check.host})


def host_name() -> str:
    """This node's name: in a job as Slurm has it, else as it calls itself, without its domain."""
    return os.environ.get("SLURMD_NODENAME") or platform.node().partition(".")[0]


def count_of(number: int, thing: str) -> str:
    """"1 process", "2 processes"."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{ending}"


def run_checks(looks: Sequence[tuple[str, Callable[[], Iterable[Check]]]], seconds: float) -> list[Check]:
    """The checks that each look gives, in order. One that raises, or that takes longer than `seconds` (a file server or a
    driver that does not answer blocks for ever), becomes a failure of that name."""
    found: list[Check] = []
    for name, look in looks:
        outcome: list[list[Check]] = []
        thread = threading.Thread(target=lambda look=look, name=name, outcome=outcome: outcome.append(_look(name, look)),
                                  name=f"doctor-{name}", daemon=True)
        thread.start()
        thread.join(seconds)
        late = Check(name, "failure", f"no answer within {seconds:.0f} s", "look at this node: what is asked here answers at "
                     "once on a sound one", host_name(), of_node=True)
        found += outcome[0] if outcome else [late]
    return found


def _look(name: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(look())
    except UserError as error:
        return [Check(name, "failure", str(error), "mend the setting", host_name())]
    except Exception as error:  # whatever a broken machine answers must not end the others
        return [Check(name, "failure", f"{type(error).__name__}: {error}", "look at this node", host_name(), of_node=True)]


def report(checks: Sequence[Check]) -> str:
    """One line a check, a remedy on a line of its own, and a last line with the verdict. What is equal on several nodes
    stands once, with their names."""
    together: dict[tuple[str, ...], list[str]] = {}
    for check in checks:
        together.setdefault((check.state, check.name, check.found, check.remedy), []).append(check.host)
    hosts = {check.host for check in checks if check.host}
    width = max((len(name) for _, name, _, _ in together), default=0)
    lines = []
    for (state, name, found, remedy), where in together.items():
        named = [host for host in dict.fromkeys(where) if host]
        place = f"  [{', '.join(named)}]" if named and len(hosts) > 1 else ""
        lines.append(f"{state:<7}  {name:<{width}}  {found}{place}")
        if remedy and state != "ok":
            lines.append(f"{'':<7}  {'':<{width}}  -> {remedy}")
    numbers = {state: sum(key[0] == state for key in together) for state in STATES}
    counts = [f"{numbers['ok']} ok", count_of(numbers["warning"], "warning"), count_of(numbers["failure"], "failure")]
    return masked("\n".join([*lines, "", ", ".join(counts)]))
