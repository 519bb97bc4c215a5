"""Rewards that ask another trained run: how likely its language model finds a text, what its classifier sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from genscale.errors import UserError
from genscale.reading import Unreadable, read_yaml
from genscale.rewards.base import Answer, TextReward


def load_run(folder: str, step: int | None = None) -> Any:
    """A trained run (`genscale.load`). By name, for what opens a run stands above the rewards. Raises UserError."""
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"run: there is no run folder {folder}")
    try:
        return import_module("genscale.api").load(Path(folder).expanduser(), step)
    except UserError as error:
        raise UserError(f"run: {error}") from None


def image_classifier(folder: str) -> tuple[Any, list[str]]:
    """The classifier of a run's images, and the names of its classes. Raises UserError."""
    run = load_run(folder)
    if not hasattr(run.objective, "generate"):
        raise UserError(f"run: {folder} is one of model.family {run.config.model.family}, which makes no images; name one that "
                        "does")
    try:
        network, names = import_module("genscale.evaluation.image_scores").classifier_of(run)
    except UserError as error:
        raise UserError(f"run: {folder} has no classifier ({error})") from None
    return network, names


@dataclass(frozen=True)
class LikelihoodSettings:
    """Whose likelihood."""

    run: str
    """Run folder of a language model, or a Hugging Face folder of one."""
    step: PositiveInt | None = None
    """Step of its checkpoint (default: the last one of a run that is complete)."""


class Likelihood(TextReward):
    """How likely another language model finds the answer after its prompt: mean log-likelihood in nats per token, 0 at most.

    Each answer is read by itself, so that a number never depends on what stands beside it. Every process holds the model whole.
    """

    settings = LikelihoodSettings

    def __init__(self, asked: LikelihoodSettings) -> None:
        super().__init__(asked)
        _check_complete(asked)
        run = load_run(asked.run, asked.step)
        if not hasattr(run.objective, "tokenizer") or "gpt" not in run.networks:
            raise UserError(f"run: {asked.run} is one of model.family {run.config.model.family}, which is no language model; "
                            "name a run of model.family gpt")
        self._network, self._device = run.networks["gpt"].requires_grad_(False), run.device
        self._tokenizer, self._positions = run.objective.tokenizer, run.networks["gpt"].settings.positions

    def identity(self) -> str:
        """SHA-256 of the weights, and of the tokenizer that they read with."""
        import torch

        hashed = hashlib.sha256(self._tokenizer.digest.encode())
        for name, values in sorted(self._network.state_dict().items()):
            hashed.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            hashed.update(values.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return hashed.hexdigest()

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """Nats per token, 0 at most."""
        found = []
        for number, answer in enumerate(answers):
            self.progress(f"answer {number + 1} of {len(answers)}")
            found.append(self._mean(answer))
        return found

    def _mean(self, answer: Answer) -> float:
        import torch

        tokenizer = self._tokenizer
        read = tokenizer.encode(answer.prompt) or [tokenizer.end_of_text]
        said = [*tokenizer.continued.encode(answer.text), *([tokenizer.end_of_text] if answer.ended else [])]
        if not said:  # nothing was written that this tokenizer has a word for
            said = [tokenizer.end_of_text]
        ids = [*read, *said][-(self._positions + 1):]
        said = said[-(len(ids) - 1):]
        tokens = torch.tensor([ids], device=self._device)
        with torch.no_grad():
            logits = self._network(tokens[:, :-1])[0, -len(said):].float()
        nats = torch.log_softmax(logits, -1).gather(1, tokens[0, -len(said):, None])
        return nats.double().mean().item()


def _check_complete(asked: LikelihoodSettings) -> None:
    """Raises UserError where the latest checkpoint may not be the last: a run that goes on would be rewarded by another."""
    folder = Path(asked.run).expanduser()
    if asked.step is not None or not (folder / "checkpoints").is_dir():
        return
    steps = sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    try:
        wanted = read_yaml(folder / "config.yaml")["train"]["steps"]
    except (OSError, Unreadable, KeyError, TypeError):
        return  # `load_run` says what is wrong
    if steps and steps[-1] < wanted:
        raise UserError(f"step: {asked.run} is at step {steps[-1]} of {wanted}, and its latest checkpoint would be another one "
                        f"after a resume; set step to {steps[-1]}, or finish that run first")


