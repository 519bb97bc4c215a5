"""ended.json: how a run came to its end, said once, by the process that knew first."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from genscale import exit_codes
from genscale.errors import CheckpointNotWritten, PortTaken, SourceLost, UnfitNode, UserError
from genscale.masking import masked
from genscale.reading import read_json
from genscale.supervise.exclusive_file import give_name
from genscale.supervise.run_owner import latest_claim
from genscale.supervise.signals import Stopped
from genscale.writing import write_draft

How = Literal["complete", "stopped", "failed", "lost", "hang", "unfit"]

RUN = "GENSCALE_RUN"
"""In a job of Slurm: the run folder, in which its script looks for a word about the end."""
SUBMIT = "GENSCALE_SUBMIT"
"""There too: the flags of `genscale slurm submit` that made the job, as they are typed."""


class PeerLost(UserError):
    """Another process of the run was killed, or its machine is gone; nothing is wrong with the run."""


@contextlib.contextmanager
def before_the_run() -> Iterator[None]:
    """Around what may find a mistake before the run has its folder: a launcher passes no exit code on, so that the script of a
    job could not tell a mistake from a machine that has failed."""
    try:
        yield
    except UserError as error:
        if RUN in os.environ:
            Ending(Path(os.environ[RUN]), int(os.environ.get("RANK", "0"))).claim(_how(error), exit_codes.USER_ERROR,
                                                                                  reason=str(error))
        raise


class Ending:
    """The file `ended.json` of a run folder (see `genscale.exit_codes`). When one process fails, the others fail soon after, of
    its absence: whoever makes this file is the one to speak, and the others end in silence, with the same exit code.

    Attributes:
        step: the last step done, as far as this process knows.
        claim_number: of the claim by which the run has its folder (`run_owner`): once there is a later one, the file is
            another run's, which a word about this one would end.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        self.rank, self.step = rank, 0
        self._path = run_folder / "ended.json"
        self._claimed = False
        self.claim_number: int | None = None

    def taken_over(self) -> bool:
        """Whether another run has the folder by now, as far as that can be seen."""
        with contextlib.suppress(OSError):
            return self.claim_number is not None and latest_claim(self._path.parent) > self.claim_number
        return False

    def moved(self, run_folder: Path) -> None:
        """The run folder is there now."""
        self._path = run_folder / self._path.name

    def clear(self) -> None:
        """The run begins."""
        self._path.unlink(missing_ok=True)

    def claim(self, how: How, exit_code: int, number: signal.Signals | None = None, reason: str = "") -> bool:
        """Say how the run ended. False where another process has said it before."""
        if self._claimed:
            return True
        if self.taken_over():
            self._claimed = True
            return True
        said = {"how": how, "signal": number.name if number else None, "step": self.step, "exit_code": exit_code,
                "reason": reason or None, "rank": self.rank, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        self._claimed = True
        try:
            give_name(write_draft(self._path, json.dumps(said, indent=1) + "\n"), self._path)
        except FileExistsError:
            self._claimed = False
        except OSError:  # on a full disk each process speaks for itself
            pass
        return self._claimed

    def failed(self, error: BaseException) -> None:
        """Claim the end by an error, before what it brings down speaks. Once more does nothing."""
        if self._claimed:
            return
        number = error.signal if isinstance(error, Stopped) else None
        how: How = "stopped" if number else _how(error)
        reason = masked(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        # The root's handlers are the log file; what stands on the console is the caller's.
        logging.getLogger().error("%s", reason, exc_info=None if isinstance(error, (UserError, Stopped)) else error)
        if self.claim(how, _exit_code(error), number, reason) and isinstance(error, UserError):
            error.alone = True

    def is_ours(self) -> bool:
        return self._claimed

    def said(self) -> dict[str, Any] | None:
        """What a process said about the end, if one did."""
        if self.taken_over():
            return None
        with contextlib.suppress(OSError, ValueError):
            said = read_json(self._path)
            return said if isinstance(said, dict) and {"how", "exit_code", "reason"} <= said.keys() else None
        return None


def _how(error: BaseException) -> How:
    if isinstance(error, UnfitNode):
        return "unfit"
    return "lost" if isinstance(error, (PeerLost, SourceLost, PortTaken, CheckpointNotWritten)) else "failed"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Stopped):
        return exit_codes.of_signal(error.signal)
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.of_signal(signal.SIGINT)
    return exit_codes.USER_ERROR if isinstance(error, UserError) else exit_codes.OUR_ERROR
