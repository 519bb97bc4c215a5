"""A language model that writes, is rewarded, and stays near to what it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genscale.data.lanes import Sample
from genscale.data.text.prompt_data import PromptData
from genscale.data.text.prompt_encoder import told_of
from genscale.data.text.prompt_settings import PromptDataSettings
from genscale.data.text.tokenizers import Tokenizer, load_tokenizer
from genscale.errors import UserError
from genscale.families.gpt.network import GPT
from genscale.families.gpt.objective import TOKENIZER_FILE, planned_tokenizer, rows_of_embedding
from genscale.families.reward.rollout import Answers, Prompts, Writer, entropy, log_probability
from genscale.families.reward.settings import RewardObjectiveSettings, RewardSettings
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.objectives.policy_gradient import STATISTICS, gap_to_optimum, policy_loss
from genscale.reading import read_json
from genscale.rewards.base import Answer
from genscale.rewards.collection import Rewards, build_rewards
from genscale.rng import Draws
from genscale.settings.config import Config
from genscale.writing import write_whole

PROMPTS_FILE = "prompts.json"
PREVIEWED = 8
"""Prompts of the validation set that are answered in a preview."""


class RewardTuning(Objective):
    """Trains `policy` to be rewarded for the answers that it writes, at a price on its divergence from the frozen `reference`.

    A batch holds prompts as `PromptEncoder` makes them. A sample is a prompt with all of its answers: what is compared never
    comes from elsewhere. A unit of the loss is an answer.

    Args:
        policy, reference: of one shape; both begin alike.
        tokenizer: what made the prompts' tokens, and reads the answers.
        settings: the `objective` section.
        rewards: what judges; or why nobody can, who only wants to write.
        seed: the run's.
        origin: where the reference comes from, in words.
        shown: some prompts, as samples, for previews.
    """

    unit = "prompts"
    loss_unit = "beta x divergence - reward"
    higher_is_better = frozenset({"reward", "greedy_reward"})
    averaged = ("policy",)
    writes = "policy"

    def __init__(self, policy: GPT, reference: GPT, tokenizer: Tokenizer, settings: RewardObjectiveSettings,
                 rewards: Rewards | UserError, *, seed: int, origin: str, shown: Sequence[Sample] = ()) -> None:
        self.networks = {"policy": policy, "reference": reference}
        self.frozen = {"reference": origin}
        self.tokenizer, self.settings, self.seed, self.shown = tokenizer, settings, seed, list(shown)
        self.rewards = rewards if isinstance(rewards, Rewards) else None
        self._unjudged = None if isinstance(rewards, Rewards) else rewards
        self.parts = [f"reward_{name}" for name in (self.rewards.names if self.rewards else [])]
        self.phases = [Phase("policy", "policy", self.loss, self.count,
                             statistics=STATISTICS | {"length", "cut", "entropy", *self.parts})]
        self.writer = Writer(policy.settings.layers, tokenizer.vocab_size, tokenizer.end_of_text, settings.tokens)
        self._draw = policy.initial_weight

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The same draw for both, where they begin from scratch."""
        return lambda key: self._draw(key, self.seed)

    def count(self, batch: Batch) -> int:
        """Answers to the prompts of a micro-batch."""
        return len(batch["sample"]) * self.settings.group

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """The phase's loss: the policy writes, is judged, and takes the gradient of its own log-probabilities."""
        group = self.settings.group
        prompts = Prompts.of(batch["prompt"], whole=draws.rehearsal)
        uniforms = draws.uniform("token", group, self.settings.tokens).flatten(0, 1)
        with self.generating("policy") as rollout:
            answers = self.writer.write(rollout, prompts, uniforms, group, never_end=draws.rehearsal)
        draws.made("answers", answers.tokens.masked_fill(~answers.mask, -1).unflatten(0, (-1, group)))
        if draws.rehearsal:
            parts = torch.zeros(len(answers.tokens), len(self.parts), device=uniforms.device)
            reward = parts.sum(1)
        else:
            parts, reward = self._judged(batch, answers, "train", draws.step)
        asked = prompts.repeated(group)
        with torch.no_grad():
            reference = log_probability(self.writer.logits(networks["reference"], asked, answers), answers)
        logits = self.writer.logits(networks["policy"], asked, answers)
        log_p = log_probability(logits, answers)
        terms = policy_loss(log_p.view(-1, group), reference.view(-1, group), reward.view(-1, group), self.settings.beta)
        # Only its gradient means something: as a number the loss is what it makes small, which the evaluations show too.
        loss = terms["loss"] - terms["loss"].detach() + self.settings.beta * terms["divergence"] - terms["reward"]
        cut = (~answers.ended).float().sum()
        return {**terms, "loss": loss, **dict(zip(self.parts, parts.sum(0), strict=True)), "cut": cut,
                "length": answers.mask.float().sum(), "entropy": entropy(logits.detach(), answers).sum()}

    def _judged(self, batch: Batch, answers: Answers, scope: str, step: int | None = None) -> tuple[Tensor, Tensor]:
        """The parts `(answers, rewards)` and the sum `(answers,)` of the rewards; without `step`, at that of the evaluation."""
        if self.rewards is None:
            raise self._unjudged or LookupError("no rewards")
        group = len(answers.tokens) // len(batch["sample"])
        told = [told_of(row.tobytes()) for row in batch["row"].cpu().numpy()]
        tokens, lengths, ended = (values.tolist() for values in (answers.tokens, answers.mask.sum(1), answers.ended))
        samples = batch["sample"].tolist()
        judged = []
        for number, (row, length, done) in enumerate(zip(tokens, lengths, ended, strict=True)):
            place, member = divmod(number, group)
            text = self.tokenizer.decode(row[: length - done])
            judged.append(Answer(told[place][0], text, told[place][1], done, samples[place], member))
        parts, total = self.rewards.score(self.rewards.step if step is None else step, judged, scope=scope)
        return parts.to(answers.tokens.device), total.to(answers.tokens.device)

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """Sums over prompts, float64: the reward of the likeliest answer, and means over as many answers as a group has; where
        divergence has a price, also the gap to the optimum, for which the reference writes as many."""
        group, beta = self.settings.group, self.settings.beta
        prompts, asked = Prompts.of(batch["prompt"].long()), Prompts.of(batch["prompt"].long()).repeated(group)
        draws = Draws(self.seed, "validation", 0, batch["sample"], batch["prompt"].device)
        with self.generating("policy") as rollout:
            greedy = self.writer.write(rollout, prompts, None)
            own = self.writer.write(rollout, prompts, draws.uniform("token", group, self.settings.tokens).flatten(0, 1), group)
        judged = [(own, *self._judged(batch, own, "validation"))]
        if beta > 0:
            with self.generating("reference") as rollout:
                uniforms = draws.uniform("reference", group, self.settings.tokens).flatten(0, 1)
                others = self.writer.write(rollout, prompts, uniforms, group)
            judged.append((others, *self._judged(batch, others, "reference")))
        log_p, reference = (torch.cat([
            log_probability(self.writer.logits(networks[name], asked, answers), answers).view(-1, group).double()
            for answers, _, _ in judged], 1) for name in ("policy", "reference"))
        reward = torch.cat([total.view(-1, group).double() for _, _, total in judged], 1)
        sums = {"greedy_reward": self._judged(batch, greedy, "greedy")[1].double().sum(),
                "reward": reward[:, :group].mean(1).sum(), "divergence": (log_p - reference)[:, :group].mean(1).sum(),
                "entropy": -log_p[:, :group].mean(1).sum(), "length": own.mask.double().sum() / group,
                "cut": (~own.ended).double().sum() / group, "prompts": torch.tensor(float(len(reward)), dtype=torch.float64)}
        sums |= dict(zip(self.parts, judged[0][1].double().sum(0) / group, strict=True))
        return sums | ({"gap": gap_to_optimum(log_p, reference, reward, beta).sum()} if beta > 0 else {})

    def summarise(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Means over the prompts; `loss` is what the tuning is to make small."""
        means = {name: total / totals["prompts"] for name, total in totals.items() if name != "prompts"}
        return {"loss": self.settings.beta * means["divergence"] - means["reward"], **means}

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        """Answers to some prompts of the validation set, each with its reward."""
        if not self.shown:
            return ""
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in self.shown])) for name in self.shown[0]}
        batch = {**{name: values.to(device) for name, values in batch.items()}, "sample": torch.arange(len(self.shown))}
        uniforms = Draws(seed, "preview", 0, batch["sample"], device).uniform("token", self.settings.tokens)
        with self.generating("policy") as rollout:
            answers = self.writer.write(rollout, Prompts.of(batch["prompt"].long()), uniforms)
        parts, total = self._judged(batch, answers, "preview")
        lines = []
        for row, tokens, mask, reward, each in zip(batch["row"].cpu().numpy(), answers.tokens.cpu(), answers.mask.cpu(),
                                                   total.tolist(), parts.tolist(), strict=True):
            of = ", ".join(f"{name.removeprefix('reward_')} {value:g}" for name, value in zip(self.parts, each, strict=True))
            said = self.tokenizer.decode(tokens[mask].tolist())
            lines.append(f"--- reward {reward:g} ({of})\n{told_of(row.tobytes())[0]}{said}")
        return "\n".join(lines)

    def save_assets(self, folder: Path) -> None:
        """Keep the tokenizer and the prompts of the previews with the run."""
        self.tokenizer.save(folder / TOKENIZER_FILE)
        kept = [{name: values.tolist() for name, values in sample.items()} for sample in self.shown]
        write_whole(folder / PROMPTS_FILE, json.dumps(kept).encode())

    def use_assets(self, config: Config, folder: Path) -> Config:
        """The prompts are cut into the tokens the policy was trained on."""
        if not (folder / TOKENIZER_FILE).exists():
            return config
        return replace(config, data=replace(config.data, tokenizer=str(folder / TOKENIZER_FILE)))


RewardConfig = Config[RewardSettings, PromptDataSettings, RewardObjectiveSettings]


def build_data(settings: PromptDataSettings, seed: int) -> PromptData:
    return PromptData(settings, seed)


def validation(settings: PromptDataSettings, seed: int) -> list[Sample]:
    return PromptData(settings, seed, for_training=False).validation()


def build(config: RewardConfig, data: PromptData) -> RewardTuning:
    """The objective of a run. Raises UserError as `_build` does, and for what no rollout can be made with."""
    if config.model.from_ is None:
        raise UserError("model.from: missing: name what the policy begins as, a run folder or a Hugging Face folder (or "
                        "scratch, for initial weights)")
    if config.train.precision in ("fp16", "fp8"):
        raise UserError(f"train.precision: {config.train.precision} rounds the log-probabilities of answers too coarsely to "
                        "compare a policy with its reference; nearest allowed: bf16")
    rewards = build_rewards(config.objective.rewards, "text")
    objective = _build(config, data.tokenizer, data.validation()[:PREVIEWED], rewards)
    for column in rewards.columns:
        if column not in config.data.columns:
            raise UserError(f"data.columns: {config.data.columns} has not '{column}', which objective.rewards read; set "
                            f"data.columns to {[*config.data.columns, column]}")
    return objective


def blueprint(config: RewardConfig) -> Blueprint:
    """What a step is planned of: with the longest prompts and answers, and without what judges take. Raises UserError as
    `_build` does."""
    tokenizer = planned_tokenizer(config.model, config.data.tokenizer)
    sample = {"prompt": torch.empty(config.data.prompt_tokens, dtype=torch.int32, device="meta"),
              "row": torch.empty(config.data.row_bytes, dtype=torch.uint8, device="meta")}
    return Blueprint(_build(config, tokenizer, [], UserError("a plan has no judges")), sample)


def restore(config: RewardConfig, folder: Path) -> RewardTuning:
    """The objective of a trained run, with the tokenizer and the prompts that its folder keeps."""
    kept = folder / TOKENIZER_FILE
    tokenizer = load_tokenizer(str(kept) if kept.exists() else config.data.tokenizer)
    rewards: Rewards | UserError
    try:
        rewards = build_rewards(config.objective.rewards, "text")
    except UserError as error:  # that of a script, or of a package that is not here: to write takes no judge
        rewards = error
    return _build(config, tokenizer, _kept_prompts(folder / PROMPTS_FILE, config.data, tokenizer), rewards)


def _kept_prompts(file: Path, data: PromptDataSettings, tokenizer: Tokenizer) -> list[Sample]:
    """What `save_assets` has written. Raises UserError where a stranger has written something else."""
    if not file.exists():
        return []
    try:
        samples: list[Sample] = [{"prompt": np.array(each["prompt"], np.int32), "row": np.array(each["row"], np.uint8)}
                                 for each in read_json(file)]
        for sample in samples:
            told_of(sample["row"].tobytes())
        are_right = all(sample["prompt"].shape == (data.prompt_tokens,) and sample["row"].ndim == 1
                        and -1 <= sample["prompt"].min() <= sample["prompt"].max() < tokenizer.vocab_size for sample in samples)
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        are_right = False
    if not are_right:
        raise UserError(f"{file}: is not what genscale writes there; delete it, which leaves the samples out")
    return samples


def _build(config: RewardConfig, tokenizer: Tokenizer, shown: Sequence[Sample], rewards: Rewards | UserError) -> RewardTuning:
    """Networks and objective.

    Raises:
        UserError: a group of one, dropout, answers that do not fit the positions.
    """
    asked, model = config.objective, config.model
    if asked.group < 2:
        raise UserError("objective.group: 1 answer to a prompt has no other to be compared with; nearest allowed: 2")
    for name in ("dropout", "attention_dropout"):
        if getattr(model, name) > 0:
            raise UserError(f"model.{name}: {getattr(model, name):g} would draw an answer from one network and reward another; "
                            "nearest allowed: 0")
    if config.data.prompt_tokens + asked.tokens > model.positions:
        raise UserError(f"objective.tokens: {asked.tokens} after data.prompt_tokens {config.data.prompt_tokens} are more than "
                        f"model.positions {model.positions}; "
                        + (f"nearest allowed: {model.positions - config.data.prompt_tokens}"
                           if model.positions > config.data.prompt_tokens else
                           f"set data.prompt_tokens to {max(1, model.positions - asked.tokens)} at most"))
    rows = rows_of_embedding(model, tokenizer, config.data.tokenizer)
    with torch.device("meta"):  # the engine fills the parameters, or its share of them
        policy, reference = GPT(model, rows), GPT(model, rows)
    return RewardTuning(policy, reference, tokenizer, asked, rewards, seed=config.run.seed, origin=model.from_ or "",
                        shown=shown)
