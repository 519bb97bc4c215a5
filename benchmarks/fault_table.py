"""What a run survives: every fault, tried on real runs, with the time it takes to train on.

    python benchmarks/fault_table.py --out benchmarks/results/faults-cpu.json
    python benchmarks/fault_table.py --only kills --families gpt --strategies ddp --kills 100 --seed 1

Runs are tiny (steps of some 50 ms on two processes); a seed picks moments, victims and numbers of processes. The harness is
that of tests/faults, which says what is checked. The file is written anew after every fault and goes on from what it holds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import ROOT, circumstances, write

sys.path.insert(0, str(ROOT / "tests" / "faults"))

from fault_bench import Bench, NoDisk
from fault_campaign import Death, survive, survive_resizes
from fault_cases import CASES

KILLS, RESIZES = "1 SIGKILL", "9 SIGKILL, and on with 1 to 4 processes"


def tally(deaths: list[Death]) -> dict[str, Any]:
    """What a campaign came to, of which every kill was survived, or it had raised."""
    found = {"times": len(deaths), "survived": len(deaths), "in_a_save": sum(death.in_save for death in deaths)}
    for name in ("victim", "moment"):
        kinds = [getattr(death.kill, name) for death in deaths]
        found[f"by_{name}"] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return found | seconds([death.seconds_to_recover for death in deaths])


def seconds(values: list[float | None]) -> dict[str, Any]:
    """Of those that were measured: a start that was killed itself never came to a step."""
    known = [value for value in values if value is not None]
    if not known:
        return {"seconds_to_recover": None}
    median, worst = round(statistics.median(known), 2), round(max(known), 2)
    return {"seconds_to_recover": {"median": median, "worst": worst, "of": len(known)}}


def campaign(run: Callable[..., list[Death]], family: str, strategy: str, kills: int, seed: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="genscale-faults-"))  # which stays where something was not survived
    found = tally(run(family, strategy, kills, seed, folder / "campaign"))
    shutil.rmtree(folder)
    return found


def cases(names: list[str], family: str, strategy: str, times: int, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case a few times on one family and strategy, against one undisturbed run; one that takes a disk that cannot be
    mounted here is left out."""
    with tempfile.TemporaryDirectory(prefix="genscale-faults-") as folder:
        bench = Bench(family, strategy, Path(folder) / "cases")
        for name in names:
            taken = []
            for attempt in range(times):
                try:
                    taken.append(CASES[name](bench, random.Random(f"{seed} {name} {attempt}")))
                except AssertionError:
                    print(f"{name}, {family}, {strategy}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                except NoDisk as error:
                    print(f"{name}: left out, {error}", file=sys.stderr, flush=True)
                    break
            else:
                yield name, {"times": times, "survived": len(taken), **seconds(taken)}


def rows(arguments: argparse.Namespace, done: set[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """What was asked for and is not among (fault, family, strategy) already."""
    only, strategies = arguments.only.split(","), arguments.strategies.split(",")
    wanted = [name for name in CASES if "cases" in only or any(word in name for word in only)]
    campaigns = [(KILLS, survive, arguments.kills)] if "kills" in only else []
    campaigns += [(RESIZES, survive_resizes, arguments.resizes)] if "resizes" in only else []
    for index, family in enumerate(arguments.families.split(",")):
        # Strategies take turns over the families: every other fault under every strategy, and in every family.
        strategy = strategies[index % len(strategies)]
        left = [name for name in wanted if (name, family, strategy) not in done]
        for name, row in cases(left, family, strategy, arguments.times, arguments.seed) if left else ():
            yield {"fault": name, "family": family, "strategy": strategy, **row}
        for name, run, kills in campaigns:
            for strategy in strategies:
                if (name, family, strategy) not in done:
                    row = campaign(run, family, strategy, -(-kills // len(strategies)), arguments.seed)
                    yield {"fault": name, "family": family, "strategy": strategy, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="kills,resizes,cases", help="kills, resizes, cases, or words of single cases")
    parser.add_argument("--families", default="gpt,dcgan,vae")
    parser.add_argument("--strategies", default="ddp,zero2,fsdp2")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of each family, over its strategies")
    parser.add_argument("--resizes", type=int, default=12, help="the same of those with another number of processes each time")
    parser.add_argument("--times", type=int, default=2, help="of each other fault, under one strategy of each family")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    now = circumstances(["torch", "accelerate", "deepspeed"])
    result = now | {"seed": arguments.seed, "rows": []}
    if arguments.out and arguments.out.exists():
        former = json.loads(arguments.out.read_text())
        result |= {key: former[key] for key in ("remark", "rows") if key in former}
    for row in rows(arguments, {(row["fault"], row["family"], row["strategy"]) for row in result["rows"]}):
        result["rows"].append(row | {"commit": now["commit"]})  # a file may hold rows of several
        print(row, file=sys.stderr, flush=True)
        write(result, arguments.out)
    if any(row["survived"] < row["times"] for row in result["rows"]):
        sys.exit("not everything was survived")


if __name__ == "__main__":
    main()
