"""What worker processes have to say goes where their training process logs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from genscale.masking import masked
from genscale.printable import printable
from genscale.writing import AppendedLog


class _Warning(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(masked(super().format(record)))


@dataclass(frozen=True)
class Logs:
    """The log files of a process with their kinds and formats, and whether genscale's own lines also go to its console."""

    files: tuple[tuple[str, type[logging.FileHandler], logging.Formatter | None], ...]
    console: bool

    @classmethod
    def here(cls) -> Logs:
        """Those of this process."""
        handlers = [*logging.getLogger().handlers, *logging.getLogger("genscale").handlers]
        files = {handler.baseFilename: (AppendedLog if isinstance(handler, AppendedLog) else logging.FileHandler,
                                        handler.formatter) for handler in handlers if isinstance(handler, logging.FileHandler)}
        console = any(not isinstance(handler, logging.FileHandler) for handler in logging.getLogger("genscale").handlers)
        return cls(tuple((path, *about) for path, about in files.items()), console)

    def follow(self) -> None:
        """Log there from now on; lines are appended, and several processes may do so."""
        ours = logging.getLogger("genscale")
        ours.setLevel(logging.INFO)
        for path, kind, formatter in self.files:
            file = kind(path, mode="a", encoding="utf-8")
            file.setFormatter(formatter)
            ours.addHandler(file)
        if self.console:
            console = logging.StreamHandler()
            console.setFormatter(_Warning("warning: %(message)s"))
            console.setLevel(logging.WARNING)
            ours.addHandler(console)
