"""genscale plan: what a run will take, before it runs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse.typing import PositiveFloat, PositiveInt

from genscale import exit_codes
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.settings.config import Config, micro_batch_of
from genscale.settings.parser import parse_config, parse_settings, split_flags

if TYPE_CHECKING:
    from genscale.planning.account import Machine
    from genscale.planning.choose import Candidate, Choices
    from genscale.planning.plan import Plan, Terms

PROG = "genscale plan [CONFIG ...]"
DESCRIPTION = (
    "Say what a run will take on devices that need not be here: memory, time and money, without its data and without a GPU. "
    "--config FILE and settings of the run as in genscale train; several CONFIGs before the first flag are planned side by "
    "side. Then come the ways to do the same run better, as flags to paste. Exit code 0: it fits; 2: it does not, or might "
    "not.")
LOOKING = 25.0
"""Seconds of computing, for the plan that was asked for and better ways together, without --search."""


@dataclass
class PlanSettings:
    """The machine, and what to say of the run on it."""

    gpus: PositiveInt = 1
    """Devices in all."""
    gpu: str | None = None
    """Kind of device: a name, as h100 or a100-40 (left out: the names are shown), or NAME=profile.json for one of your own."""
    gpus_per_node: PositiveInt | None = None
    """Devices of one node (default: as such nodes have them, or all of them where they are fewer)."""
    between_nodes: str | None = None
    """Speed of one node's network cards together, as 400Gb/s or 50GB/s (default: as such nodes have it)."""
    search: bool = False
    """Look at every other way to do the run, however long that takes, not only at those nearby."""
    goal: Literal["speed", "memory", "cost", "fewest-gpus"] = "speed"
    """What the ways are ordered by; cost and fewest-gpus look at fewer GPUs too."""
    price: PositiveFloat | None = None
    """Of an hour of one GPU, in any currency."""
    tokens: PositiveFloat | None = None
    """Length of the run in tokens, as 10e9 (default: train.steps)."""
    spare: str = "10%"
    """Share of the memory that must stay free."""
    explain: Literal["memory", "time"] | None = None
    """Show where the memory or the time goes, and how each number was found."""
    json: bool = False
    """Print one JSON object instead of text."""
    calibrate: bool = False
    """Measure this machine for a minute and write its profile, for --gpu NAME=FILE: at the sizes of the run, where one is
    named; under srun or a launcher also the network."""
    out: str | None = None
    """FILE that --calibrate writes (default: profile.json)."""
    measure: str | None = None
    """RUN: hold a finished run against its plan. Its machine is that which it was trained on; --gpu names it where the run
    folder does not."""


class Spent(NamedTuple):
    """Seconds of computing so far, in all and for the plan that was asked for."""

    all: float
    planning: float


OF_A_RUN = ("config", "hooks", "print_config")
"""Flags without a dot that are the run's."""


def main(arguments: list[str]) -> int:
    """Exit code 0: it fits (all of them do); 2: it does not, or something is wrong."""
    asked, named, run = read(arguments)
    _refuse_unheeded(asked, len(named))
    if asked.calibrate:
        return _calibrate(asked, [*(f"--config={name}" for name in named), *run])
    if asked.measure is not None:
        return _measure(asked, [*named, *run])
    if not named and not any(word.partition("=")[0] == "--config" for word in run):
        raise UserError("--config: name the YAML file of the run, or one that `genscale configs` lists, as --config gpt/demo")
    machine, terms = machine_of(asked), terms_of(asked)
    if len(named) > 1:
        return _side_by_side(asked, named, run, machine, terms)
    config = parse_config(FAMILIES, [*(f"--config={name}" for name in named), *run], "genscale plan")
    return _one(asked, config, machine, terms)


def _refuse_unheeded(asked: PlanSettings, named: int) -> None:
    """Raises UserError for a flag that has no effect beside the others."""
    if asked.out is not None and not asked.calibrate:
        raise UserError(f"--out: {asked.out} has no effect without --calibrate; leave it out")
    every = {field.name for field in fields(asked)} - {"calibrate", "measure"}
    if asked.calibrate:
        beside, without = "--calibrate", every - {"out"} | {"measure"}
    elif asked.measure is not None:
        beside, without = "--measure", every - {"gpu", "gpus_per_node", "between_nodes", "spare", "json"}
    elif asked.explain is not None:
        beside, without = "--explain", {"search", "goal", "json"}
    elif named > 1:
        beside, without = "several configs, each of which is planned as it stands", {"search", "goal"}
    else:
        return
    for field in fields(asked):
        value = getattr(asked, field.name)
        if field.name in without and value != field.default:
            shown = "" if value is True else f" {value}"
            raise UserError(f"--{field.name}:{shown} has no effect beside {beside}; leave it out")


def read(arguments: Sequence[str]) -> tuple[PlanSettings, list[str], list[str]]:
    """The flags of the verb, the configs that stand before them, and the settings of the run. Raises UserError."""
    count = next((index for index, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    named, rest = list(arguments[:count]), list(arguments[count:])
    own, run = split_flags(rest, lambda name: "." not in name and name not in OF_A_RUN)
    if {"-h", "--help"} & set(rest):
        own, run = ["--help"], []
    return parse_settings(PlanSettings, own, PROG, DESCRIPTION), named, run


def _one(asked: PlanSettings, config: Config, machine: Machine, terms: Terms) -> int:
    began = time.process_time()
    from genscale.planning import report
    from genscale.planning.as_json import as_dict
    from genscale.planning.explain import explain_memory, explain_time
    from genscale.planning.plan import plan

    loaded = time.process_time()
    yours = plan(config, machine, terms)
    spent = Spent(time.process_time() - began, time.process_time() - loaded)
    if asked.explain is not None:
        print(explain_memory(yours) if asked.explain == "memory" else explain_time(yours))
        return code_of([yours])
    if asked.json:
        print(json.dumps(as_dict(yours, _choose(asked, yours, spent)), indent=1))
    else:
        print(report.text(yours), flush=True)  # before the others are looked at, which takes longer
        print(report.ways(_choose(asked, yours, spent)))
    return code_of([yours])


def _choose(asked: PlanSettings, yours: Plan, spent: Spent) -> Choices:
    from genscale.planning.choose import Chooser

    def show(candidate: Candidate) -> None:
        if asked.search and sys.stderr.isatty():
            print(f"\r\033[K{candidate.flags}: {candidate.plan.verdict}", end="", file=sys.stderr, flush=True)

    chooser = Chooser(yours, asked.goal, None if asked.search else LOOKING - spent.all, show, each=spent.planning)
    choices = chooser.search() if asked.search else chooser.neighbours()
    if asked.search and sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return choices


def _side_by_side(asked: PlanSettings, named: Sequence[str], run: Sequence[str], machine: Machine, terms: Terms) -> int:
    from genscale.planning import report
    from genscale.planning.as_json import as_dict
    from genscale.planning.plan import Plan, plan

    if asked.explain:
        raise UserError(f"--explain: is about one run, and {len(named)} are named; name one")
    if given := [word for word in run if word.partition("=")[0] == "--config"]:
        raise UserError(f"{given[0]}: stands beside {len(named)} configs that are named; name all of them there")
    found: list[tuple[str, Plan | str]] = []
    for name in named:
        config = parse_config(FAMILIES, [f"--config={name}", *run], "genscale plan")
        try:
            found.append((name, plan(config, machine, terms)))
        except UserError as error:
            found.append((name, str(error)))
    plans = [each for _, each in found if isinstance(each, Plan)]
    if asked.json:
        said = {name: as_dict(each) if isinstance(each, Plan) else {"refused": each} for name, each in found}
        print(json.dumps(said, indent=1))
    else:
        print(report.table(found))
    return code_of(plans) if len(plans) == len(found) else exit_codes.USER_ERROR


def _measure(asked: PlanSettings, run: Sequence[str]) -> int:
    from genscale.planning.finished import beside, finished, table
    from genscale.planning.plan import plan
    from genscale.planning.report import heading, in_words

    if run:
        raise UserError(f"{run[0]}: has no effect beside --measure, which takes the settings that the run was trained with; "
                        "leave it out")
    found = finished(Path(str(asked.measure)))
    machine = found.machine(asked.gpu, asked.gpus_per_node, read_rate(asked.between_nodes))
    planned = plan(found.config, machine, terms_of(asked))
    lines = beside(planned, found)
    if asked.json:
        figures = [{**asdict(line), "error": line.error} for line in lines]
        print(json.dumps({"run": str(found.folder), "figures": figures}, indent=1))
    else:
        print("\n".join([heading(planned), in_words(planned), table(lines)]))
    return exit_codes.DONE


def _calibrate(asked: PlanSettings, run: Sequence[str]) -> int:
    import platform

    from genscale.cluster.slurm_task import adopt_slurm_task
    from genscale.parallel.launch_request import clear_launch_environment, read_launch_request, resolve_precision
    from genscale.parallel.processes import Processes
    from genscale.planning.account import Machine
    from genscale.planning.calibrate import calibrate, write_profile
    from genscale.planning.trace import CPU, plan_step

    config = parse_config(FAMILIES, run, "genscale plan") if run else None
    adopt_slurm_task()
    request, file = read_launch_request(), Path(asked.out or "profile.json")
    clear_launch_environment()
    processes = Processes(request.world_size > 1)
    try:
        precision = resolve_precision(config.train.precision if config else "auto", request)
        kind = CPU if processes.device.type == "cpu" else "h100"  # of GPUs all are alike to the step
        step = plan_step(_alone(config, precision), Machine(kind, 1, 1)) if config else None
        made = calibrate(processes, processes.gather(platform.node()), file.absolute().parent, precision, step)
        if processes.is_main:
            write_profile(made, file)
            print(f"{file}: {made.device}, {made.origin}\nplan with it: genscale plan --config ... --gpu mine={file}")
    except OSError as error:
        raise UserError(f"--out: cannot write {file} ({error.strerror}); give a file in a folder you can write to") from None
    finally:
        processes.close()
    return exit_codes.DONE


def _alone(config: Config, precision: str) -> Config:
    """A micro-batch of the run on one device."""
    size: Any = micro_batch_of(config.train) or 1
    settings: dict[str, Any] = {"precision": precision, "micro_batch_size": size, "global_batch_size": size}
    parallel = replace(config.parallel, strategy="auto", shard_size=None, context=1, offload="none")
    return replace(config, train=replace(config.train, **settings), parallel=parallel)


def code_of(plans: Sequence[Plan]) -> int:
    """0 where all of them fit."""
    return exit_codes.DONE if all(plan.fits for plan in plans) else exit_codes.USER_ERROR


def machine_of(asked: PlanSettings) -> Machine:
    """The machine that is asked about. Raises UserError for one that cannot be."""
    from genscale.planning.account import Machine
    from genscale.planning.profiles import profile, profile_names

    if asked.gpu is None:
        raise UserError(f"--gpu: name the kind of device: {', '.join(profile_names())}, or NAME=profile.json for one of your "
                        "own")
    usual, gpus = profile(asked.gpu).gpus_per_node, asked.gpus
    each = asked.gpus_per_node or min(gpus, usual)
    if gpus % each:
        near = [number for number in (gpus // each * each, (gpus // each + 1) * each) if number]
        smaller = max(number for number in range(1, each + 1) if gpus % number == 0)
        raise UserError(f"--gpus: {gpus} are no whole number of nodes of {each}; nearest that are: "
                        f"{' or '.join(map(str, near))}, or --gpus_per_node {smaller}")
    return Machine(asked.gpu, gpus, each, read_rate(asked.between_nodes))


def terms_of(asked: PlanSettings) -> Terms:
    """What the plan is reckoned with. Raises UserError."""
    from genscale.planning.plan import Terms

    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", asked.spare)
    spare = float(found[1]) / (100 if found[2] else 1) if found else 1.0
    if spare >= 1:
        raise UserError(f"--spare: must be a share of the memory below 100%, as 10%, not '{asked.spare}'")
    return Terms(spare, asked.price, asked.tokens)


def read_rate(text: str | None) -> float | None:
    """Bytes a second of `400Gb/s` (bits), `3.2Tb/s` or `50GB/s` (bytes). Raises UserError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(b|B|bit|bytes?)(?:/s|ps)", text)
    if found is None or not float(found[1]):
        raise UserError(f"--between_nodes: '{text}' is no speed of a network; write 400Gb/s (bits) or 50GB/s (bytes), of all "
                        "network cards of a node together")
    scale = {"M": 1e6, "G": 1e9, "T": 1e12}[found[2]]
    return float(found[1]) * scale / (8 if found[3] in ("b", "bit") else 1)
