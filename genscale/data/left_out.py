"""Conversations that cannot be learnt from, and prompts that cannot be asked: counted, named, and too many of them an error."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from genscale.errors import UserError

log = logging.getLogger("genscale")
FIRST_JUDGED = 1000
"""Conversations of a source that is not read as a whole after which the share of bad ones is looked at."""
NAMED = 3
"""Bad conversations that are named one by one; of the further ones the number is said each time that it has grown tenfold."""


class LeftOut:
    """What a process has left out of a source of conversations. Whether a row is left out depends on the row alone, so that the
    order of the others is the same for any number of processes.

    Args:
        source: as `key=value`, for messages.
        bad_share: see `TextDataSettings`.
        answer_roles: the roles that answer, as `key=value`.
        fault: what is read, and what is wrong with it, in words.

    Attributes:
        read, written: conversations that were read, and that the template was given (others are read ahead).
        first: what is wrong with the first bad conversation.
        whole: the source is being read from front to back.
    """

    def __init__(self, source: str, bad_share: float, answer_roles: str,
                 fault: str = "conversations cannot be learnt from") -> None:
        self._source, self._bad_share, self._answer_roles, self._fault = source, bad_share, answer_roles, fault
        self.read = self.written = self.unanswered = 0
        self._unreadable = self._refused = 0
        self.first: UserError | None = None
        self.whole = False
        self._roles: Counter[str] = Counter()
        self._names: list[str] = []

    def __reduce__(self) -> tuple:
        return LeftOut, (self._source, self._bad_share, self._answer_roles, self._fault)  # each process counts for itself

    @property
    def bad(self) -> int:
        """Conversations that were left out for what is wrong with them."""
        return self._unreadable + self._refused

    def refuse(self, error: UserError, written: bool = False) -> None:
        """Leave a conversation out for what is wrong with it, as it was read or `written`.

        Raises:
            UserError: too many are.
        """
        self._refused += written
        self._unreadable += not written
        self.first = self.first or error
        if self.whole:
            self._names += [str(error)] if self.bad <= NAMED else []
            return
        if (len(self._names) < NAMED and str(error) not in self._names) or _is_power_of_ten(self.bad):
            self._names.append(str(error))  # not again in the next epoch
            log.warning("%s; it is left out, as %d so far", error, self.bad)
        self._judge(FIRST_JUDGED)

    def pass_over(self, roles: list[str]) -> None:
        """Leave a conversation out in which nobody answers."""
        self.unanswered += 1
        self._roles.update(dict.fromkeys(roles, 1))
        if not self.whole and _is_power_of_ten(self.unanswered):
            log.warning("%s", self._nobody())

    @contextmanager
    def of_the_whole(self) -> Iterator[None]:
        """While a source is read from front to back: what was left out is judged, and said in a line each, when that is done.

        Raises:
            UserError: too many bad ones.
        """
        self.whole = True
        try:
            yield
        finally:
            self.whole = False
        self._judge()
        if self._names:
            more = f"; and {self.bad - len(self._names)} more" if self.bad > len(self._names) else ""
            log.warning("%s: %d of %d %s are left out: %s%s", self._source, self.bad, self.read, self._fault.split()[0],
                        "; ".join(self._names), more)
            self._names = []
        if 0 < self.unanswered < self.read:  # of no conversation at all an error says it
            log.warning("%s", self._nobody())

    def no_answer(self) -> str:
        """Why there is no conversation at all: the roles that were found; empty where that is not why."""
        return f": {self._nobody().removeprefix(self._source + ': ')}" if self.unanswered else ""

    def _judge(self, least: int = 1) -> None:
        for bad, count in ((self._unreadable, self.read), (self._refused, self.written)):
            if count >= least and bad > self._bad_share * count:
                advice = f", or set data.bad_share above {bad / count:.3g} (also for a run that goes on)" if bad < count else ""
                raise UserError(f"{self.first}; {bad} of {count} {self._fault}, more than data.bad_share="
                                f"{self._bad_share}: mend or remove them{advice}")

    def _nobody(self) -> str:
        roles = ", ".join(role for role, _ in self._roles.most_common(8))
        return (f"{self._source}: nobody answers in {self.unanswered} of {self.read} conversations, which are left out: their "
                f"roles are {roles}, and {self._answer_roles} names those that answer")


def _is_power_of_ten(number: int) -> bool:
    return str(number).rstrip("0") == "1"
