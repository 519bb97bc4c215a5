"""The one exception that means "the user can mend this": shown as a single line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, fields

from genscale.masking import masked
from genscale.printable import printable


class UserError(Exception):
    """A wrong setting, path or file. Its message is one line: the key, the value, the reason, the nearest allowed setting;
    no password or token, and nothing that a terminal would obey.

    Attributes:
        alone: this process is known to be the one to say it; else it leaves that to rank 0, which has the same error as a rule.
    """

    alone = False

    def __init__(self, message: str) -> None:
        super().__init__(printable(masked(" ".join(str(message).split()))))


class SourceLost(UserError):
    """The server of a run's data, or the hub, has not answered for as long as the run waits; nothing is wrong with the run."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the choice closest to `word`, or an empty string when none is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{found[0]}'?)" if found else ""


def refuse_unheeded(section: str, settings: object, names: Iterable[str], beside: str) -> None:
    """Raises UserError for the first of these settings that is not its default: it would have no effect.

    Args:
        section: of the config.
        names: the settings that have none.
        beside: the setting that leaves them without.
    """
    plain = {field.name: field.default if field.default_factory is MISSING else field.default_factory()
             for field in fields(settings)}
    for name in names:
        if (value := getattr(settings, name)) != plain[name]:
            raise UserError(f"{section}.{name}: {value} has no effect with {beside}; leave it out")
