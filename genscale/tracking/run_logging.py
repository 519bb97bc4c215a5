"""Logs of a run: one file a rank with everything, and genscale's own messages of rank 0 on the console."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch  # noqa: F401 - its import puts console handlers on a dozen loggers: they must be there to be removed
from tqdm import tqdm

from genscale.errors import UserError
from genscale.masking import masked
from genscale.printable import printable, printable_lines
from genscale.writing import AppendedLog, make_folder

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# These put a console handler on their logger when they are first imported, which may be after the set-up.
LATE_LIBRARIES = ("DeepSpeed", "datasets", "transformers")


class _RankFile(AppendedLog):
    """The log file of this rank (a class of its own, so that a second set-up finds and replaces it)."""

    def emit(self, record: logging.LogRecord) -> None:
        # A library's logger holds this handler and may propagate to the root, which holds it too (transformers turns
        # propagation on where the variable CI is set).
        if not getattr(record, "in_rank_file", False):
            record.in_rank_file = True
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a full disk; a traceback for each line would say no more
            super().handleError(record)


class _Masked(logging.Formatter):
    """Without passwords and tokens, whichever library has logged them (HTTP clients log the addresses they ask), and without
    what a terminal would obey.

    Times are in UTC: a run may go on in another time zone."""

    converter = staticmethod(time.gmtime)
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(masked(super().format(record)))

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)  # what others log, and ours at work, may have several
        ours = record.name.partition(".")[0] == "genscale"
        return printable(line) if ours and record.levelno >= logging.WARNING else line


class _Console(logging.Handler):
    """Prints the message on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
        except Exception:  # as in every logging handler: a closed console must not stop the run
            self.handleError(record)


def setup_logging(run_folder: str | Path, rank: int) -> logging.Logger:
    """The `genscale` logger: to `<run folder>/logs/rank-<5 digits>.log` with time stamps, on rank 0 also to stderr, plainly.

    Python warnings and what other libraries log go to the file only (their loggers lose their console handlers). A second call
    in the same process moves everything to the new run's file.

    Raises:
        UserError: the log file cannot be written.
    """
    path = Path(run_folder) / "logs" / f"rank-{rank:05d}.log"
    try:
        make_folder(path.parent, parents=True)
        file = _RankFile(path, mode="a", encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    except OSError as error:
        raise UserError(f"run.dir: {run_folder} cannot be written ({error}); choose another folder with --run.dir") from None
    file.setLevel(logging.INFO)
    file.setFormatter(_Masked(FORMAT))

    ours = logging.getLogger("genscale")
    _detach_earlier()
    logging.getLogger().addHandler(file)
    logging.captureWarnings(True)
    _keep_libraries_off_console(file)
    ours.setLevel(logging.INFO)
    if rank == 0:
        console = _Console()
        console.setFormatter(_Masked())
        ours.addHandler(console)
    return ours


def forget_run() -> None:
    """Close the run's log file and console, and let libraries have console handlers again."""
    _detach_earlier()
    for name in LATE_LIBRARIES:
        vars(logging.getLogger(name)).pop("addHandler", None)


def _loggers() -> list[logging.Logger]:
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [logging.getLogger(), *known]


def _detach_earlier() -> None:
    for logger in _loggers():
        for handler in list(logger.handlers):
            if isinstance(handler, (_RankFile, _Console)):
                logger.removeHandler(handler)
                handler.close()


def _keep_libraries_off_console(file: logging.Handler) -> None:
    for logger in _loggers():
        # Exactly StreamHandler: its subclasses write to files, or are somebody's deliberate choice (pytest's capture).
        console = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        for handler in console:
            logger.removeHandler(handler)
        if console and logger.name not in LATE_LIBRARIES:
            logger.propagate = True  # torch's loggers do not, for they had handlers of their own
    for name in LATE_LIBRARIES:
        logger = logging.getLogger(name)
        logger.propagate = False  # DeepSpeed sets this when it is imported; so for all of them: the file directly, once
        logging.Logger.addHandler(logger, file)  # by the class: a second set-up finds the instance's own replaced below
        logger.addHandler = _ignore_handler  # type: ignore[method-assign]


def _ignore_handler(hdlr: logging.Handler) -> None:
    """In the place of a library logger's `addHandler`: its console handler is not wanted."""
