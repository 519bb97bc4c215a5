"""Writing that a run can do without: a disk that is full, or lost, costs lines and samples, not the run."""

from __future__ import annotations

from collections.abc import Callable


class Writes:
    """Tries to write, and says so once where it fails and once where it succeeds again, not at every step.

    Args:
        warn: takes the warning, one line.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._failed: dict[str, int] = {}  # how often, since when it last succeeded, by what it was

    def attempt(self, what: str, write: Callable[[], object]) -> None:
        """`write`; an OSError becomes a warning about `what`, which names the file or the kind of files."""
        try:
            write()
        except OSError as error:
            self._failed[what] = self._failed.get(what, 0) + 1
            if self._failed[what] == 1:
                self._warn(f"{what} could not be written: {error.strerror or error}; training goes on, and this is said once")
            return
        if failed := self._failed.pop(what, 0):
            self._warn(f"{what} can be written again, after {failed} failure{'s' if failed > 1 else ''}")
