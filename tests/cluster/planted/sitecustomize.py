"""Pauses and faults in the training processes of a job, so that a test meets them where it means to. Python runs this file at
the start of every process that has this folder on its path.

PLANTED is a list of `what@step`, or `what@step/life` for that life of the job only (0: before the first requeue):

    hold           in the middle of the step, until the file PLANTED_FOLDER/go-<life> is there
    hold-save      before the step's checkpoint gets its name, likewise (in the background; rank 0)
    hold-end       after the last step, before the run is said to be complete, likewise
    hold-requeue   when the processes have ended, before the job looks at how, likewise (in no rank; the step is not looked at)
    await-signal   in the middle of the step, until this process has got a signal that stops the run
    die            rank 0 is killed in the step, as for want of memory
    mistake        a user's mistake comes to light in the step

and `pace@seconds`: every step takes so much longer.

A process that holds leaves PLANTED_FOLDER/<what>-<life>-<rank>, and one that got a signal <name>-<life>-<rank>. Elements of an
array have folders of their own in it, called by their numbers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PLANTED = os.environ.get("PLANTED", "").split(",")
FOLDER = Path(os.environ.get("PLANTED_FOLDER", "."), os.environ.get("SLURM_ARRAY_TASK_ID", ""))
PACE = sum(float(word.removeprefix("pace@")) for word in PLANTED if word.startswith("pace@"))
LIFE, RANK = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("RANK", "")


def planted(what: str, step: int) -> bool:
    return f"{what}@{step}" in PLANTED or f"{what}@{step}/{LIFE}" in PLANTED


def leave(word: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{word}-{LIFE}-{RANK}").touch()


def hold(what: str) -> None:
    leave(what)
    while not (FOLDER / f"go-{LIFE}").exists():
        time.sleep(0.02)


def listen() -> None:
    """Tell of signals, and plant the rest when the loop begins: what that takes is loaded then anyway, and a run listens for
    signals before it loads it."""
    from genscale.supervise.signals import StopSignal

    handle, loop_begins = StopSignal._handle, StopSignal.loop_begins

    def handle_and_tell(self: StopSignal, number: int, frame: Any) -> None:
        leave(signal.Signals(number).name)
        handle(self, number, frame)

    def plant_and_begin(self: StopSignal) -> None:
        plant()
        loop_begins(self)

    StopSignal._handle, StopSignal.loop_begins = handle_and_tell, plant_and_begin


def plant() -> None:
    from genscale.checkpoint import saving
    from genscale.errors import UserError
    from genscale.supervise.supervision import Supervision
    from genscale.training.trainer import Trainer

    update_averages, commit, ended = Trainer.update_averages, saving.commit, Supervision.ended

    def in_step(self: Trainer, step: int) -> None:
        time.sleep(PACE)
        if planted("hold", step):
            hold("hold")
        while planted("await-signal", step) and not self.stop.received:
            time.sleep(0.02)
        if planted("die", step) and RANK == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if planted("mistake", step):
            raise UserError("data.source: a planted mistake")
        update_averages(self, step)

    def before_commit(partial: Path, step: int, *arguments: Any) -> Any:
        if planted("hold-save", step):
            hold("hold-save")
        return commit(partial, step, *arguments)

    def before_the_end(self: Supervision, stopped_by: signal.Signals | None) -> None:
        if any(word.startswith("hold-end@") for word in PLANTED):
            hold("hold-end")
        ended(self, stopped_by)

    Trainer.update_averages, saving.commit, Supervision.ended = in_step, before_commit, before_the_end


if "GENSCALE_CODE" in os.environ:  # this file is read before the job's copy of genscale is put first
    sys.path.insert(0, os.environ["GENSCALE_CODE"])
if RANK and any(PLANTED):
    listen()
elif sys.orig_argv[2:4] == ["slurm", "end"] and planted("hold-requeue", 0):
    hold("hold-requeue")
