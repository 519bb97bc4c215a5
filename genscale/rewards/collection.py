"""The rewards of one policy together: asked, checked, written down where they may not be repeated, and added up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genscale.errors import UserError, nearest
from genscale.rewards.base import Answer, ImageReward, Reward, TextReward
from genscale.rewards.entries import KEY, Entry, read_entries
from genscale.rewards.registry import REWARDS, GivenReward, unknown

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("genscale")
TRIES = 3
"""How often a judge is asked that fails."""
KINDS: dict[str, type[Reward]] = {"text": TextReward, "images": ImageReward}
WORDS = {"text": "texts", "images": "pictures"}


class Rewards:
    """Several rewards and their weights: what an objective holds (`Objective.rewards`), and a run opens.

    Attributes:
        names: of the parts, for metrics `reward_<name>`; of several of one name the later ones are numbered.
        weights: of the parts.
        columns: those of a prompt's row that any of them reads.

    Example:
        >>> rewards = build_rewards([{"name": "exact"}, {"name": "length", "weight": 0.5, "target": 3}], "text")
        >>> rewards.names, rewards.columns
        (['exact', 'length'], ('answer',))
        >>> parts, total = rewards.score(1, [Answer("2+2=", "4", {"answer": "4"}, True, 0, 0)])
        >>> parts.shape, total.shape
        (torch.Size([1, 2]), torch.Size([1]))
    """

    def __init__(self, parts: Sequence[tuple[Entry, Reward]]) -> None:
        self._parts = list(parts)
        self.names = _numbered([entry.name for entry, _ in parts])
        self.weights = [entry.weight for entry, _ in parts]
        self.columns = tuple(dict.fromkeys(column for _, reward in parts if isinstance(reward, TextReward)
                                           for column in reward.columns))
        self._note: Callable[[str], None] = lambda doing: None

    def open(self, folder: Path, rank: int, step: int, note: Callable[[str], None]) -> None:
        """A run begins, after `step`, with this folder; `note` tells its watchdog of progress. (Journal to follow.)"""
        self._note = note
        for _, reward in self._parts:
            reward.progress = note

    def close(self) -> None:
        """End what the rewards have started."""
        for _, reward in self._parts:
            reward.close()

    def score(self, step: int, judged: Sequence[Answer] | Tensor, samples: Sequence[int] | Tensor | None = None,
              members: Sequence[int] | Tensor | None = None, scope: str = "train") -> tuple[Tensor, Tensor]:
        """What each answer, or each picture, is worth.

        Args:
            step: the step of the run.
            judged: answers; or images fp32 `(n, channels, height, width)` in [0, 1].
            samples, members: of each picture, the sample in the run's one global order and its number among those of that
                sample, `(n,)`. An answer says its own.
            scope: what for: of one scope, step, sample and member there is one answer.

        Returns:
            The parts, fp32 `(n, parts)` in the order of `names`, and their weighted sum, fp32 `(n,)`; on the CPU for answers,
            beside the images for images.

        Raises:
            UserError: a judge has failed, also when it was asked again.
        """
        import torch

        columns = []
        for name, (entry, reward) in zip(self.names, self._parts, strict=True):
            self._note(f"step {step}, reward {name}")
            columns.append(_asked(entry, reward, judged))
        parts = torch.tensor(columns, dtype=torch.float64).T.reshape(len(judged), len(columns))
        total = parts @ torch.tensor(self.weights, dtype=torch.float64)
        device = judged.device if isinstance(judged, torch.Tensor) else None
        return parts.float().to(device), total.float().to(device)


def build_rewards(entries: Any, reads: Literal["text", "images"], key: str = KEY) -> Rewards:
    """The rewards that a config asks for, ready to judge.

    Args:
        entries: of the config, as `completed` gives them.
        reads: what the policy makes.
        key: where they stand in the config.

    Raises:
        UserError: there is none of that name, it judges something else, or lacks what it needs; in one line, with the key.
    """
    found = read_entries(entries, key)
    if not found:
        raise UserError(f"{key}: names no reward; give one, as [{{name: exact}}] (`genscale rewards` lists them)")
    return Rewards([(entry, _built(entry, reads)) for entry in found])


def _built(entry: Entry, reads: Literal["text", "images"]) -> Reward:
    kind, fitting = KINDS[reads], names_of(reads)
    if entry.name not in REWARDS:
        raise UserError(f"{entry.key}.name: {unknown(entry.name, fitting)}")
    if not issubclass(REWARDS[entry.name], (kind, GivenReward)):
        raise UserError(f"{entry.key}.name: '{entry.name}' does not judge {WORDS[reads]}, which this policy makes; choose one "
                        f"of {', '.join(fitting)}{nearest(entry.name, fitting)}")
    try:
        return REWARDS.make(entry.name, entry.asked, kind)
    except UserError as error:
        raise UserError(f"{entry.key}.{error}") from None


def names_of(reads: str) -> list[str]:
    """The rewards that judge what a policy of this kind makes; of packages, those that can be loaded."""
    names = []
    for name in REWARDS:
        try:
            if issubclass(REWARDS[name], (KINDS[reads], GivenReward)):
                names.append(name)
        except UserError:
            continue
    return names


def _numbered(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    counts: dict[str, int] = {}
    numbered = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        numbered.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return numbered


def _asked(entry: Entry, reward: Reward, judged: Any) -> list[float]:
    """What one reward says, each a finite number. Raises UserError."""
    for attempt in range(1, TRIES + 1):
        try:
            return _numbers(reward.judge(judged), len(judged))
        except UserError as error:
            raise UserError(f"{entry.key} ({entry.name}): {error}") from None
        except Exception as error:  # whatever it does
            why = str(error) if isinstance(error, _WrongAnswer) else f"{type(error).__name__}: {error}"
            if attempt == TRIES:
                raise UserError(f"{entry.key} ({entry.name}): {why}; asked {TRIES} times; mend the reward, and start the run "
                                "again: it goes on from its latest checkpoint") from error
            log.warning("%s (%s): %s; asked again, %d of %d", entry.key, entry.name, why, attempt, TRIES - 1)
    raise AssertionError


class _WrongAnswer(ValueError):
    """A judge gave what is no judgement."""


def _numbers(values: Any, count: int) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise _WrongAnswer(f"gave {values!r:.80}, and not a number for each of {count}") from None
    if len(numbers) != count:
        raise _WrongAnswer(f"gave {len(numbers)} numbers for {count}")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise _WrongAnswer(f"gave {number} for the answer at {index} of {count}")
    return numbers
