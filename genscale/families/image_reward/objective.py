"""The family `image_reward`: a policy over pictures is improved by reward while it stays near a reference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.data.lanes import Sample
from genscale.errors import UserError, refuse_unheeded
from genscale.families import dcgan, vae, vae_gan
from genscale.families.entry import Family
from genscale.families.image_reward.data import DrawnData
from genscale.families.image_reward.judge import FrozenClassifier, HeldClassified
from genscale.families.image_reward.policies import DecoderPolicy, LatentPolicy, PicturePolicy, Written
from genscale.families.image_reward.settings import DrawnDataSettings, ImageRewardObjectiveSettings, ImageRewardSettings
from genscale.models.image_grid import grid_of_rows
from genscale.objectives.base import Batch, Blueprint, Networks, Objective, Phase, Terms
from genscale.objectives.policy_gradient import STATISTICS, gap_to_optimum, policy_loss
from genscale.reading import dump_yaml
from genscale.rewards.collection import Rewards, build_rewards
from genscale.rewards.picture_settings import ClassifiedSettings
from genscale.rng import Draws, torch_generator
from genscale.settings.config import Config
from genscale.settings.parser import load_config

SOURCES: dict[str, Family] = {entry.FAMILY.name: entry.FAMILY for entry in (vae, vae_gan, dcgan)}
"""Families whose runs one may begin from."""
PRECISIONS = ("auto", "fp32", "bf16")
PREVIEW_IMAGES, PREVIEW_COLUMNS = 32, 16


class ImagePolicy(Objective):
    """Trains `policy` to make pictures that are worth more: maximises E[reward - beta x (log p - log p of the reference)].

    A batch holds `sample`; each sample is a group of pictures, all of them drawn by its number.

    Args:
        policy: what draws pictures.
        rewards: judge them; or why nobody can, who only wants to draw.
        settings: the `objective` section.
        image_shape: `(channels, size, size)`.
        seed: the run's.
        origin: of the policy's frozen networks, in words.
        classifiers: that the rewards ask.

    Attributes:
        source: reads the networks of the run that this one begins from; a run puts it there.
    """

    unit = "pictures"
    loss_unit = "beta x divergence - reward"
    higher_is_better = frozenset({"reward"})
    averaged = ("policy",)
    class_names = None

    def __init__(self, policy: PicturePolicy, rewards: Rewards | UserError, settings: ImageRewardObjectiveSettings, *,
                 image_shape: tuple[int, int, int], seed: int, origin: str,
                 classifiers: Sequence[FrozenClassifier] = ()) -> None:
        self.policy, self.settings, self.image_shape, self.seed = policy, settings, image_shape, seed
        self.rewards = rewards if isinstance(rewards, Rewards) else None
        self._unjudged = None if isinstance(rewards, Rewards) else rewards
        self.networks, self.latent_shape = dict(policy.networks), policy.latent_shape
        self.frozen = {name: origin for name in self.networks if name != "policy"}
        self._judging = {each.run: f"classifier_{number}" for number, each in enumerate(classifiers, 1)}
        for each in classifiers:
            self.networks[self._judging[each.run]], self.frozen[self._judging[each.run]] = each, each.origin
        self.units_per_sample = settings.group
        self.source: Callable[[str], Callable[[str], Tensor]] = _no_source
        self._parts = [f"reward_{name}" for name in (self.rewards.names if self.rewards else [])]
        self.phases = [Phase("policy", "policy", self.loss, self.count, statistics=STATISTICS | set(self._parts))]

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        """The run's, or a flow that changes nothing yet."""
        network = self.networks[name]
        if isinstance(network, FrozenClassifier):
            return network.trained()
        return self.policy.initial_weights(name, self.source)

    def count(self, batch: Batch) -> int:
        """Pictures of a micro-batch."""
        return len(batch["sample"]) * self.settings.group

    def loss(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        """`policy_loss` over the pictures; statistics besides are the parts of the reward."""
        written = self.policy.write(networks, draws, self.settings.group, self.generating)
        if draws.rehearsal:  # nobody is asked for anything, and what takes memory here takes it
            with torch.no_grad():
                for name in self._judging.values():
                    networks[name](written.images.flatten(0, 1))
            reward = torch.zeros_like(written.log_p, requires_grad=False)
            parts = dict.fromkeys(self._parts, reward)
        else:
            parts, reward = self._judged(networks, written.images, batch["sample"], "train", draws.step)
        terms = policy_loss(written.log_p, written.log_reference, reward, self.settings.beta)
        return terms | {name: part.sum() for name, part in parts.items()}

    @torch.no_grad()
    def _judged(self, networks: Networks, images: Tensor, samples: Tensor, scope: str,
                step: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """The parts by name and the reward, each `(batch, group)`, of images `(batch, group, ...)`; without `step`, at that of
        the evaluation."""
        if self.rewards is None:
            raise self._unjudged or LookupError("no rewards")
        for judge in self.rewards.judges:
            if isinstance(judge, HeldClassified):
                judge.network = networks[self._judging[judge.asked.run]]
        shape = images.shape[:2]
        members = torch.arange(shape[1]).expand(shape)
        step = self.rewards.step if step is None else step
        parts, total = self.rewards.score(step, images.detach().flatten(0, 1), samples[:, None].expand(shape).flatten(),
                                          members.flatten(), scope)
        named = {name: part.view(shape) for name, part in zip(self._parts, parts.unbind(1), strict=True)}
        return named, total.view(shape)

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        """By picture, of a group of the policy and after it as large a one of the reference: `log_p`, `log_reference`, `reward`
        and its parts."""
        device = next(networks["policy"].parameters()).device
        draws, group = Draws(self.seed, "validation", 0, batch["sample"], device), self.settings.group
        both = [self.policy.write(networks, draws, group, self.generating), self.policy.write_reference(networks, draws, group)]
        written = Written(*(torch.cat([getattr(each, name) for each in both], 1) for name in Written.__dataclass_fields__))
        parts, reward = self._judged(networks, written.images, batch["sample"], "validation")
        return {"log_p": written.log_p, "log_reference": written.log_reference, "reward": reward, **parts}

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """`loss`, minus what is maximised; `reward`, its parts and the `divergence` of the policy; `reward_before`, the
        reference's, and `reward_best`, that of the best policy there is; `gap`, how far from that the policy is, in nats."""
        beta = self.settings.beta
        values = {name: self._by_prompt(value.double()) for name, value in totals.items()}
        half = values["reward"].shape[1] // 2
        own = {name: value[:, :half] for name, value in values.items()}
        reference = values["reward"][:, half:]
        divergence = (own["log_p"] - own["log_reference"]).mean().item()
        reward = own["reward"].mean().item()
        best = ((reference / beta).softmax(1) * reference).sum(1).mean().item()
        gap = gap_to_optimum(values["log_p"], values["log_reference"], values["reward"], beta).mean().item()
        return {"loss": beta * divergence - reward, "reward": reward, **{name: own[name].mean().item() for name in self._parts},
                "divergence": divergence, "reward_before": reference.mean().item(), "reward_best": best, "gap": gap}

    def _by_prompt(self, values: Tensor) -> Tensor:
        """`(prompts, 2 x n)`, the policy's first, of `(samples, 2 x group)`."""
        if not self.policy.pooled:
            return values
        return torch.cat([half.reshape(1, -1) for half in values.chunk(2, 1)], 1)

    @torch.no_grad()
    def generate(self, networks: Networks, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Expected pictures of the policy, fp32 `(batch, channels, size, size)` in [0, 1], of noise `(batch,
        *latent_shape)`."""
        return self.policy.generate(networks, latents)

    @torch.no_grad()
    def preview(self, networks: Networks, seed: int, device: torch.device) -> np.ndarray:
        """Pictures of the reference above those of the policy, of the same noise."""
        noise = torch.randn(PREVIEW_IMAGES, *self.latent_shape, generator=torch_generator(seed, "preview")).to(device)
        return grid_of_rows({"before": self.policy.generate_reference(networks, noise),
                             "policy": self.policy.generate(networks, noise)}, PREVIEW_COLUMNS)


def _no_source(name: str) -> Callable[[str], Tensor]:
    raise LookupError(f"nobody reads the network {name} of the run that this one begins from")


ImageRewardConfig = Config[ImageRewardSettings, DrawnDataSettings, ImageRewardObjectiveSettings]


def build_data(settings: DrawnDataSettings, seed: int) -> DrawnData:
    return DrawnData(settings)


def validation(settings: DrawnDataSettings, seed: int) -> list[Sample]:
    return DrawnData(settings).validation()


def build(config: ImageRewardConfig, data: DrawnData) -> ImagePolicy:
    """The objective of a run. Raises UserError as `restore` does, and for a precision in which nothing is to be drawn."""
    _check(config)
    return _build(config, _rewards(config))


def blueprint(config: ImageRewardConfig) -> Blueprint:
    """What a step is planned of: the shapes of the run that it begins from, which `model.started` says, and no weights; without
    what judges take but classifiers. Raises UserError as `build` does, but for what judges lack."""
    _check(config)
    objective = _build(config, UserError("a plan has no judges"))
    return Blueprint(objective, {"number": torch.empty((), dtype=torch.int64, device="meta")})


def restore(config: ImageRewardConfig, folder: Path) -> ImagePolicy:
    """The objective of a trained run, also where its rewards are not known here: it may only be to draw."""
    try:
        return _build(config, _rewards(config))
    except UserError as error:
        return _build(config, error)


def _build(config: ImageRewardConfig, rewards: Rewards | UserError) -> ImagePolicy:
    """Networks and objective.

    Raises:
        UserError: a run that makes no pictures to begin from, or that has no such policy.
    """
    model, started = config.model, _started(config.model)
    run = _config_of(model)
    maker = _maker(run, started.get("classes"))
    with torch.device("meta"):
        classifiers = [FrozenClassifier(folder, len(names)) for folder, names in started["judges"].items()]
    return ImagePolicy(_policy(config, maker, run.model.family), rewards, config.objective, image_shape=maker.image_shape,
                       seed=config.run.seed, origin=f"{model.from_}, step {started['step']:,}", classifiers=classifiers)


def _check(config: ImageRewardConfig) -> None:
    if config.train.precision not in PRECISIONS:
        raise UserError(f"train.precision: {config.train.precision} is too coarse for the density of what is drawn; use bf16 "
                        "or fp32")
    if config.objective.group < 2:
        raise UserError(f"objective.group: {config.objective.group} picture has no others to be compared with; set at least 2")


def _rewards(config: ImageRewardConfig) -> Rewards:
    judges = _started(config.model)["judges"]

    def held(asked: ClassifiedSettings) -> HeldClassified:
        if asked.run not in judges:
            raise UserError(f"run: {asked.run} is not what judged when the run began ({', '.join(judges) or 'none'}), whose "
                            "network the run folder keeps, wherever that run is now; set it back, or begin a new run with "
                            "another --run.name")
        return HeldClassified(asked, judges[asked.run])

    return build_rewards(config.objective.rewards, "images", own={"classifier": held})


def _started(model: ImageRewardSettings) -> dict[str, Any]:
    """What the run is that this one begins from. Raises UserError where there is none, or a stranger has written another
    thing there."""
    if model.from_ is None or model.started is None:
        raise UserError(f"model.from: names no run; give the folder of a trained {', '.join(SOURCES)}")
    started = model.started
    sections, judges = started.get("config"), started.get("judges")
    if not (isinstance(sections, dict) and isinstance(sections.get("model"), dict) and isinstance(started.get("step"), int)
            and isinstance(judges, dict) and all(map(_is_names, judges.values()))
            and (started.get("classes") is None or _is_names(started["classes"]))):
        raise UserError("model.started: is not what genscale writes there; leave it out, and begin a new run")
    return started


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _config_of(model: ImageRewardSettings) -> Config[Any, Any, Any]:
    """The config of the run that this one begins from."""
    sections = _started(model)["config"]
    name = sections["model"].get("family")
    if not isinstance(name, str) or name not in SOURCES:
        advice = "to tune a GPT, set model.family reward" if name in ("gpt", "reward") else f"take a {', '.join(SOURCES)}"
        raise UserError(f"model.from: {model.from_} is a run of model.family {name}, from which image_reward cannot begin; "
                        f"{advice}")
    with tempfile.TemporaryDirectory() as empty:
        file = Path(empty) / "config.yaml"
        file.write_text(dump_yaml(sections, allow_unicode=True))
        return load_config(SOURCES, file)


def _maker(run: Config[Any, Any, Any], classes: list[str] | None) -> Any:
    """Its objective, the networks on the meta device. The names of the classes lie in its folder, which may be gone."""
    with tempfile.TemporaryDirectory() as empty:
        maker: Any = SOURCES[run.model.family].restore(run, Path(empty))
    maker.class_names = classes
    return maker


def _policy(config: ImageRewardConfig, maker: Any, name: str) -> PicturePolicy:
    model = config.model
    if model.policy == "latent":
        return LatentPolicy(maker, model, config.run.seed)
    refuse_unheeded("model", model, ["layers", "width", "label"], "model.policy decoder")
    if name != "vae":
        network = "generator" if name == "dcgan" else "decoder"
        raise UserError(f"model.policy: decoder trains a density of pixels, and the {network} of {model.from_} (model.family "
                        f"{name}) has none; use model.policy latent")
    return DecoderPolicy(maker)
