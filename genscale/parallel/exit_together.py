"""How a process of a group ends: without the interpreter's teardown."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from genscale import exit_codes


def run_and_leave(run: Callable[[], int | None]) -> NoReturn:
    """Run, then end this process as Python would: with what `run` returns or gives `sys.exit`, or with the error's traceback.

    All that is registered for the end is done, but the interpreter is not taken down: threads of gloo and autograd that still
    hold Python references are then now and then ended in the middle of that ("terminate called without an active exception",
    SIGABRT; pytorch pull request 179291), and a run that was done would seem to have failed.
    """
    try:
        code = _number(run())
    except SystemExit as end:
        code = _number(end.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = exit_codes.OUR_ERROR
    # In the interpreter's own order. (logging and multiprocessing have registered what they do at the end.)
    threading._shutdown()  # type: ignore[attr-defined]  # no public name does the same
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, a full disk, or none at all
            stream.flush()
    os._exit(code)


def _number(code: Any) -> int:
    """The exit code that is meant by what `sys.exit` may be given."""
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1
