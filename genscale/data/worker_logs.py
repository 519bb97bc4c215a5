"""What worker processes have to say goes where their training process logs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from genscale.writing import AppendedLog


@dataclass(frozen=True)
class Logs:
    """The log files of a process with their formats, and whether genscale's own lines also go to its console."""

    files: tuple[tuple[str, logging.Formatter | None], ...]
    console: bool

    @classmethod
    def here(cls) -> Logs:
        """Those of this process."""
        handlers = [*logging.getLogger().handlers, *logging.getLogger("genscale").handlers]
        files = {handler.baseFilename: handler.formatter for handler in handlers if isinstance(handler, logging.FileHandler)}
        console = any(not isinstance(handler, logging.FileHandler) for handler in logging.getLogger("genscale").handlers)
        return cls(tuple(files.items()), console)

    def follow(self) -> None:
        """Log there from now on; lines are appended, and several processes may do so."""
        ours = logging.getLogger("genscale")
        ours.setLevel(logging.INFO)
        for path, formatter in self.files:
            file = AppendedLog(path, mode="a", encoding="utf-8")
            file.setFormatter(formatter)
            ours.addHandler(file)
        if self.console:
            console = logging.StreamHandler()
            console.setFormatter(logging.Formatter("warning: %(message)s"))
            console.setLevel(logging.WARNING)
            ours.addHandler(console)
