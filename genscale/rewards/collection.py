"""The rewards of one policy together: asked, checked, written down where they may not be repeated, and added up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from genscale.errors import UserError, nearest
from genscale.rewards.asking import insist, numbers
from genscale.rewards.base import Answer, ImageReward, Reward, TextReward
from genscale.rewards.entries import KEY, Entry, numbered, read_entries
from genscale.rewards.journal import Address, Journal, hash_of
from genscale.rewards.registry import INSTALLED, REWARDS, GivenReward, unknown

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[str, type[Reward]] = {"text": TextReward, "images": ImageReward}
WORDS = {"text": "texts", "images": "pictures"}


class Rewards:
    """Several rewards and their weights: what an objective holds (`Objective.rewards`), and a run opens.

    Attributes:
        names: of the parts, for metrics `reward_<name>`; of several of one name the later ones are numbered.
        weights: of the parts.
        judges: the rewards themselves.
        columns: those of a prompt's row that any of them reads.
        step: of the run that an evaluation or a sample belongs to, by which what is judged in it is recorded.

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
        self.names = numbered([entry.name for entry, _ in parts])
        self.weights = [entry.weight for entry, _ in parts]
        self.columns = tuple(dict.fromkeys(column for _, reward in parts if isinstance(reward, TextReward)
                                           for column in reward.columns))
        self.judges = [reward for _, reward in parts]
        self.step = 0
        self._note: Callable[[str], None] = lambda doing: None
        self._journal: Journal | None = None

    def open(self, folder: Path, rank: int, step: int, note: Callable[[str], None]) -> None:
        """A run begins, or goes on after `step`.

        Args:
            folder: the run folder, where what judges say that may say something else when asked again is written down.
            rank: of this process.
            note: tells the run's watchdog of progress.
        """
        self._note, self.step = note, step
        if not all(reward.repeatable for _, reward in self._parts):
            self._journal = Journal(folder, rank, step)

    def close(self) -> None:
        """End what the rewards have started."""
        for _, reward in self._parts:
            reward.close()
        if self._journal is not None:
            self._journal.close()

    def origins(self) -> dict[str, dict[str, str]]:
        """Where those that are not built in come from, by name, for a checkpoint."""
        return {entry.name: origin for entry, _ in self._parts if (origin := REWARDS.origin(entry.name))}

    def identities(self) -> dict[str, dict[str, str]]:
        """Of the rewards that ask trained networks of their own, by the names of the parts: `sha256` of the network, and
        `origin`, the run that it is of."""
        return {name: {"sha256": digest, "origin": str(entry.given.get("run", entry.name))}
                for name, (entry, reward) in zip(self.names, self._parts, strict=True) if (digest := reward.identity())}

    def other_versions(self, checkpoint: Path) -> list[str]:
        """Packages that a checkpoint was made with in another version than is used here."""
        return [other for name in self.origins() if (other := INSTALLED.other_version(name, checkpoint))]

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
            SourceLost: a server that judges does not answer.
            UserError: a judge has failed, also when it was asked again.
        """
        import torch

        self.step = step
        if self._journal is not None:
            self._journal.at(step)
        columns = []
        for name, (entry, reward) in zip(self.names, self._parts, strict=True):
            doing = f"step {step}, reward {name}"
            self._note(doing)
            reward.progress = lambda at, doing=doing: self._note(f"{doing}, {at}")  # type: ignore[misc]
            if reward.repeatable or self._journal is None:
                columns.append(_asked(entry, reward, judged))
            else:
                content = _content(judged)
                addresses = _addresses(step, judged, samples, members, scope)
                columns.append(_recorded(self._journal, name, entry, reward, judged, addresses, content))
        parts = torch.tensor(columns, dtype=torch.float64).T.reshape(len(judged), len(columns))
        total = parts @ torch.tensor(self.weights, dtype=torch.float64)
        device = judged.device if isinstance(judged, torch.Tensor) else None
        return parts.float().to(device), total.float().to(device)


def _asked(entry: Entry, reward: Reward, judged: Any) -> list[float]:
    """What one reward says, each a finite number. Raises UserError."""
    who = f"{entry.key} ({entry.name})"
    try:
        return insist(lambda: numbers(reward.judge(judged), len(judged)), who)  # type: ignore[attr-defined]
    except UserError as error:
        raise error if str(error).startswith(who) else type(error)(f"{who}: {error}") from error.__cause__


def _recorded(journal: Journal, name: str, entry: Entry, reward: Reward, judged: Any, addresses: Sequence[Address],
              content: Sequence[str]) -> list[float]:
    """The same, as it was said before where that is written down, else asked for and written down."""
    said = [journal.said(name, address, each) for address, each in zip(addresses, content, strict=True)]
    missing = [index for index, reward_of in enumerate(said) if reward_of is None]
    if missing:
        asked = judged[missing] if hasattr(judged, "shape") else [judged[index] for index in missing]
        found = _asked(entry, reward, asked)
        journal.keep(name, [(addresses[index], content[index], value) for index, value in zip(missing, found, strict=True)])
        for index, value in zip(missing, found, strict=True):
            said[index] = value
    return [value for value in said if value is not None]


def _addresses(step: int, judged: Any, samples: Any, members: Any, scope: str) -> list[Address]:
    if samples is None:
        return [Address(scope, step, int(answer.sample), int(answer.member)) for answer in judged]
    return [Address(scope, step, int(sample), int(member)) for sample, member in zip(samples, members, strict=True)]


def _content(judged: Any) -> list[str]:
    if not hasattr(judged, "shape"):
        return [hash_of(answer) for answer in judged]
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).hexdigest() for image in judged.cpu().float().contiguous()]


def build_rewards(entries: Any, reads: Literal["text", "images"], key: str = KEY,
                  own: Mapping[str, Callable[[Any], Reward]] | None = None) -> Rewards:
    """The rewards that a config asks for, ready to judge.

    Args:
        entries: of the config, as `completed` gives them.
        reads: what the policy makes.
        key: where they stand in the config.
        own: by name, what makes those whose networks the objective has among its own, of their settings.

    Raises:
        UserError: there is none of that name, it judges something else, or lacks what it needs; in one line, with the key.
    """
    found = read_entries(entries, key)
    if not found:
        raise UserError(f"{key}: names no reward; give one, as [{{name: exact}}] (`genscale rewards` lists them)")
    return Rewards([(entry, _built(entry, reads, own or {})) for entry in found])


def _built(entry: Entry, reads: Literal["text", "images"], own: Mapping[str, Callable[[Any], Reward]]) -> Reward:
    kind, fitting = KINDS[reads], names_of(reads)
    if entry.name not in REWARDS:
        raise UserError(f"{entry.key}.{unknown(entry.name, fitting)}")
    if not issubclass(REWARDS[entry.name], (kind, GivenReward)):
        raise UserError(f"{entry.key}.name: '{entry.name}' does not judge {WORDS[reads]}, which this policy makes; choose one "
                        f"of {', '.join(fitting)}{nearest(entry.name, fitting)}")
    try:
        return own[entry.name](entry.asked) if entry.name in own else REWARDS.make(entry.name, entry.asked, kind)
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
