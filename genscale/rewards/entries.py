"""What a config says of rewards, `objective.rewards: [{name: exact, weight: 1}, ...]`: checked, with defaults written out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from genscale.errors import UserError
from genscale.rewards.registry import REWARDS
from genscale.settings.keys import as_key
from genscale.settings.parser import settings_of

KEY = "objective.rewards"
MOST = 64
"""Rewards of one policy."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One reward of a config.

    Attributes:
        key: where it stands, as `objective.rewards[0]`.
        name: of the reward.
        weight: of what it says, in the sum.
        asked: its typed settings; None where nothing of that name is known (yet).
        given: its settings as they were given.
    """

    key: str
    name: str
    weight: float
    asked: Any
    given: Mapping[str, Any]


def read_entries(entries: Any, key: str = KEY) -> list[Entry]:
    """The rewards that a config asks for. A name that is not known is left to whoever builds them: a script may still give it.

    Raises:
        UserError: what is no list of mappings, an unknown or wrong setting; "<key>[<number>].<setting>: <why>".
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise UserError(f"{key}: must be a list of rewards like [{{name: exact}}], not {entries!r:.80}")
    if len(entries) > MOST:
        raise UserError(f"{key}: names {len(entries):,} rewards; at most {MOST} are heeded")
    return [_entry(entry, f"{key}[{number}]") for number, entry in enumerate(entries)]


def _entry(entry: Any, key: str) -> Entry:
    if not isinstance(entry, Mapping):
        raise UserError(f"{key}: must be a mapping like {{name: exact, weight: 1}}, not {entry!r:.80}")
    given = {str(name): value for name, value in entry.items() if name not in ("name", "weight")}
    name, weight = entry.get("name"), entry.get("weight", 1.0)
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{key}.name: must be the name of a reward, not {name!r:.80}; `genscale rewards` lists them")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= sys.float_info.max:
        raise UserError(f"{key}.weight: must be a finite number, not {weight!r:.80}")
    asked: Any = None
    if name in REWARDS:
        try:
            kind = REWARDS[name].settings
        except UserError as error:  # of a package
            raise UserError(f"{key}.{error}") from None
        asked = settings_of(kind, given, key)
    return Entry(key, name, float(weight), asked, given)


def completed(entries: Any, key: str = KEY) -> list[dict[str, Any]]:
    """The same list with every default written out, as a run's config.yaml holds it: for the `__post_init__` of an objective's
    settings. Raises UserError as `read_entries`.

    >>> completed([{"name": "exact"}])
    [{'name': 'exact', 'weight': 1.0, 'column': 'answer', 'strip': True, 'casefold': False}]
    """
    return [{"name": entry.name, "weight": entry.weight, **_settings(entry)} for entry in read_entries(entries, key)]


def numbered(names: Sequence[str]) -> list[str]:
    """What parts are called: of several of one name the later ones are numbered.

    >>> numbered(["regex", "exact", "regex"])
    ['regex', 'exact', 'regex_2']
    """
    return [name if not (before := names[:index].count(name)) else f"{name}_{before + 1}" for index, name in enumerate(names)]


def moved(was: Any, now: Any) -> set[str]:
    """The parts of two lists of complete entries whose trained run lies elsewhere; none where they differ in anything else."""
    if not isinstance(was, list) or not isinstance(now, list):
        return set()
    if [{**entry, "run": None} for entry in was] != [{**entry, "run": None} for entry in now]:
        return set()
    names = numbered([entry["name"] for entry in now])
    return {name for name, before, after in zip(names, was, now, strict=True) if before.get("run") != after.get("run")}


def _settings(entry: Entry) -> dict[str, Any]:
    if entry.asked is None:
        return dict(entry.given)
    own = dataclasses.asdict(entry.asked) if dataclasses.is_dataclass(entry.asked) else {}  # type: ignore[arg-type]
    return {as_key(name): value for name, value in own.items()}
