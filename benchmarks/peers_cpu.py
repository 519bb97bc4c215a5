"""`genscale train` against what its users would run instead: each from its own command line, step by step in turns.

    python benchmarks/peers_cpu.py --out benchmarks/results/peers-cpu.json
    python benchmarks/peers_cpu.py --only nanogpt,dcgan/8 --nanogpt nanoGPT --text input.txt

Every contestant is a command in processes of its own, with the environment that its users have: ours is `python -m genscale
train`, which sets what it sets; theirs are nanoGPT's train.py as it is, and the scripts of peers/, which know nothing of
genscale. All are loaded at once and take their steps in turns (contestants.py), each asleep while another steps, with a short
pause in between for threads that spin. The peer runs twice: the second is the control, whose ratio to the first would be 1 on a
quiet machine. Ours trains with tracking disabled but where the name says otherwise, for theirs track nothing. A quarter of an
hour on two cores; quiet ones, or the control will tell.

Lightning: pip install --no-deps --target FOLDER lightning lightning-utilities torchmetrics, and --packages FOLDER, which only
the peers see. --hogs 1 keeps a core busy with something else meanwhile.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from contestants import Failed, first_steps, race, whole_command
from peers_cases import Case, Inputs, cases, nanogpt_command, our_nanogpt_twin
from peers_inputs import nanogpt, shakespeare
from report import circumstances, write
from turns import compared, hogs

LOSS_STEPS = 500
SETTLED_STEP = 100
COMMAND_ROUNDS = 2
FIRST_STEP_ROUNDS = 4
PACKAGES = ("torch", "accelerate", "transformers", "deepspeed")
ALIKE = 0.05
"""Relative difference of parameters: nanoGPT's 65 characters are 320 rows here."""
LOSS = re.compile(r"loss['\"]?[:=\s]+'?\"?(\d+\.\d+)")


def measure(case: Case, scratch: Path, seconds: float) -> dict[str, Any]:
    """The comparison of one case. Raises Failed, and SystemExit where the two train different networks."""
    turns, about = race({"genscale": case.ours, case.peer: case.theirs, "control": case.theirs}, scratch, seconds, case.unit)
    ours, theirs = (about["parameters"][name] for name in ("genscale", case.peer))
    if case.processes == 1 and abs(ours - theirs) > ALIKE * theirs:
        raise SystemExit(f"{case.name}: the networks are not the same: {ours:,} and {theirs:,} parameters")
    losses = {name: LOSS.findall((scratch / name / "output.txt").read_text()) for name in ("genscale", case.peer)}
    last = {name: float(found[-1]) for name, found in losses.items() if found}
    return {"threads": case.threads, "processes": case.processes, "precision": case.precision, **about,
            "last_logged_losses": last, **compared(turns)}


def whole_commands(inputs: Inputs, scratch: Path) -> dict[str, Any]:
    """Commands to their ends, one after the other, that nothing holds up between steps: what a step takes, and the loss."""
    ours, theirs = our_nanogpt_twin(inputs, steps=LOSS_STEPS), nanogpt_command(inputs, steps=LOSS_STEPS)
    turns: dict[str, list[Any]] = {"genscale": [], "nanoGPT": [], "control": []}
    for number in range(COMMAND_ROUNDS):
        for name, program in (("genscale", ours), ("nanoGPT", theirs), ("control", theirs)):
            turns[name].append(whole_command(program, scratch / f"{name}-{number}", SETTLED_STEP, LOSS_STEPS))
    found = re.findall(r"validation: loss (\d+\.\d+)", (scratch / "genscale-0" / "output.txt").read_text())
    command = [sys.executable, str(Path(__file__).parent / "peers" / "nanogpt_loss.py"),
               str(scratch / "nanoGPT-0" / "out" / "ckpt.pt"), "data/shakespeare_char/val.bin"]
    said = subprocess.run(command, cwd=inputs.nanogpt, env={**os.environ, "PYTHONPATH": str(inputs.nanogpt)}, check=True,
                          capture_output=True, text=True).stdout
    return {"threads": inputs.threads, "steps": LOSS_STEPS, **compared(turns),
            "loss_on_the_whole_validation_text": {"genscale": float(found[-1]), "nanoGPT": float(said.split()[-1])}}


def to_the_first_step(inputs: Inputs, scratch: Path) -> dict[str, Any]:
    """From the command to the end of the first step, which stands for the step's time here; with and without tracking."""
    theirs = nanogpt_command(inputs)
    programs = {"genscale": our_nanogpt_twin(inputs, tracking="default"), "untracked": our_nanogpt_twin(inputs),
                "nanoGPT": theirs, "control": theirs}
    turns = first_steps(programs, scratch, FIRST_STEP_ROUNDS)
    peers = {name: turns[name] for name in ("nanoGPT", "control")}
    return {"threads": inputs.threads, **compared({"genscale": turns["genscale"], **peers}),
            "tracking_disabled": compared({"genscale": turns["untracked"], **peers})}


def everything(inputs: Inputs, seconds: float) -> Iterator[tuple[str, Case | None, Callable[[Path], dict[str, Any]]]]:
    """Name, case if it is one, and what measures it in a scratch folder."""
    for case in cases(inputs):
        yield case.name, case, partial(measure, case, seconds=seconds)
    yield "nanogpt-command", None, partial(whole_commands, inputs)
    yield "nanogpt-first-step", None, partial(to_the_first_step, inputs)


def missing_inputs(inputs: Inputs, nanogpt_folder: Path | None, text: Path | None) -> str:
    """Puts nanoGPT and the text where `inputs` says; why that cannot be done, or nothing."""
    try:
        shakespeare(text, inputs.text)
        nanogpt(nanogpt_folder, inputs.text, inputs.nanogpt)
    except OSError as error:
        return f"{error}; give --nanogpt FOLDER and --text FILE"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names or their beginnings, as in nanogpt,dcgan/8; --list shows all")
    parser.add_argument("--list", action="store_true", help="show the names, and stop")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="where the name does not say")
    parser.add_argument("--seconds", type=float, default=15, help="of the turns of a comparison, five rounds at least")
    parser.add_argument("--hogs", type=int, default=0, help="processes that keep cores busy meanwhile")
    parser.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT; else it is fetched")
    parser.add_argument("--text", type=Path, help="tiny Shakespeare, one file; else it is fetched")
    parser.add_argument("--packages", type=Path, help="a folder with more packages for the peers")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # contestants end with us
    wanted = arguments.only.split(",") if arguments.only else [""]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        packages = [arguments.packages.resolve()] if arguments.packages else []
        inputs = Inputs(Path(folder), arguments.threads, packages)
        work = [each for each in everything(inputs, arguments.seconds) if each[0].startswith(tuple(wanted))]
        if arguments.list:
            print("\n".join(name for name, *_ in work))
            return
        result = circumstances(PACKAGES) | {"hogs": arguments.hogs, "comparisons": {}, "skipped": {}}
        need = any(case is None or case.needs_text for _, case, _ in work)
        lacking = missing_inputs(inputs, arguments.nanogpt, arguments.text) if need else ""
        with hogs(arguments.hogs):
            for number, (name, case, work_of) in enumerate(work, 1):
                print(f"{number} of {len(work)}: {name}", file=sys.stderr, flush=True)
                began = time.monotonic()
                reason = case.missing() if case else ""
                reason = reason or (lacking if case is None or case.needs_text else "")
                try:
                    found = {} if reason else work_of(inputs.folder / name.replace("/", "-"))
                except Failed as error:
                    reason = f"it failed: {error}"
                if reason:
                    result["skipped"][name] = reason
                    print(f"{name}: skipped: {reason}", flush=True)
                    continue
                result["comparisons"][name] = found
                print(f"{name}: {found['ratio_of_medians']} {found['quartiles_of_ratios']}, control "
                      f"{found['control']['ratio_of_medians']}, CPU {found['ratio_of_cpu_medians']}, {found['rounds']} rounds, "
                      f"{time.monotonic() - began:.0f} s", flush=True)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
