"""Pictures by reward: the densities are exact, the gradient is that of what is maximised, and what a run began from is needed
once only."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.checkpoint.checkpoints import find_checkpoints
from genscale.errors import UserError
from genscale.families import FAMILIES, family
from genscale.families.image_reward.flow import BINS, REACH, LatentFlow, Move, drawn_class, log_normal, spline
from genscale.families.image_reward.halves import Coupling
from genscale.models.initial_weights import InitialWeights
from genscale.objectives.likelihoods import LIKELIHOODS
from genscale.objectives.policy_gradient import policy_loss
from genscale.rewards.registry import REWARDS
from genscale.rng import Draws
from genscale.settings.parser import parse_config

DIGITS = {"source": "digits", "size": 8, "channels": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vae": {"family": "vae", "architecture": "mlp", "hidden_width": 8, "hidden_layers": 1, "latents": 3,
            "likelihood": "bernoulli"},
    "grey": {"family": "vae", "width": 4, "multipliers": [1, 2], "latents": 2, "latent": "spatial"},
    "vae_gan": {"family": "vae_gan", "width": 4, "multipliers": [1, 2], "latents": 4, "discriminator_width": 4},
    "dcgan": {"family": "dcgan", "architecture": "mlp", "width": 8, "latent": 5, "classes": 10},
    "gpt": {"family": "gpt"},
}  # fmt: skip
CLASSES = [str(digit) for digit in range(10)]


def built(run: str, without: Sequence[str] = (), **settings: Any) -> Any:
    """The objective of a run that begins from one of `MODELS`, its weights drawn by a fixed seed.

    Args:
        without: what `model.started` does not say.
    """
    config = {"model.family": "image_reward", "model.from": run, "objective.rewards": [{"name": "brightness"}],
              "model.layers": 4, "model.width": 8, **settings}
    if settings.get("model.policy") == "decoder":
        config = {key: value for key, value in config.items() if key not in ("model.layers", "model.width")} | settings
    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config.items()]
    parsed = parse_config(FAMILIES, words)
    started = {"config": {"model": MODELS[run], "data": DIGITS}, "step": 7, "judges": {}, "flow": "directions",
               "classes": CLASSES if MODELS[run].get("classes") else None}
    started = {name: value for name, value in started.items() if name not in without}
    parsed = dataclasses.replace(parsed, model=dataclasses.replace(parsed.model, started=started))
    objective: Any = family("image_reward").build_objective(parsed, None)
    generator = torch.Generator().manual_seed(3)
    for network in objective.networks.values():
        network.to_empty(device="cpu").eval()
        for tensor in network.state_dict().values():
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in network.named_buffers():
            if name.endswith("running_var"):
                tensor.fill_(1.0)
    return objective


@pytest.mark.parametrize(("size", "classes", "spread", "layer"), [(5, 0, 1.0, Move), (4, 3, 1.0, Move), (1, 0, 1.0, Move),
                                                                  (5, 0, 4.0, Move), (5, 0, 1.0, Coupling),
                                                                  (4, 3, 1.0, Coupling)])
def test_the_density_of_a_flow_is_that_of_what_it_draws(size: int, classes: int, spread: float, layer: type) -> None:
    flow = LatentFlow(size, layers=5, width=8, classes=classes, layer=layer)
    generator = torch.Generator().manual_seed(1)
    noise = spread * torch.randn(6, size + bool(classes), generator=generator)  # the wide ones reach into the tails
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    latents, labels = flow(noise)
    found = flow(latents=latents, labels=labels)
    for row in range(len(noise)):
        head, own = noise[row : row + 1, : bool(classes)], noise[row, int(bool(classes)) :]
        jacobian = torch.autograd.functional.jacobian(lambda e, head=head: flow(torch.cat([head[0], e])[None])[0][0], own)
        true = log_normal(own[None])[0] - torch.linalg.slogdet(jacobian)[1]
        if flow.class_logits is not None:
            true = true + flow.class_logits().log_softmax(0)[labels[row]]
        torch.testing.assert_close(found[row], true)


@pytest.mark.parametrize("bend", [1.0, 5.0, 20.0])
def test_a_spline_is_monotonic_and_its_own_inverse_however_it_bends(bend: float) -> None:
    generator = torch.Generator().manual_seed(2)
    shape = bend * torch.randn(300, 3 * BINS - 1, dtype=torch.float64, generator=generator)
    grid = torch.cat([torch.linspace(-6, 6, 121), torch.tensor([-REACH, -REACH + 1e-6, REACH - 1e-6, REACH, 1e4])]).double()
    x = grid.unique().expand(300, -1).clone().requires_grad_()
    y, log_slope = spline(x, shape[:, None].expand(-1, x.shape[1], -1))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), log_slope, atol=1e-7, rtol=1e-7)
    assert (y.diff(dim=1) > 0).all()
    outside = x.abs() >= REACH
    assert torch.equal(y[outside], x[outside]) and (log_slope[outside] == 0).all()
    back, log_back = spline(y.detach(), shape[:, None].expand(-1, x.shape[1], -1), inverse=True)
    torch.testing.assert_close(back, x.detach(), atol=1e-7, rtol=0)
    torch.testing.assert_close(log_back, -log_slope.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bend", [1.0, 5.0, 20.0])
def test_the_density_of_a_bent_normal_adds_up_to_its_probabilities(bend: float) -> None:
    """Between any two points, by the trapezoidal rule, in the tails too; the points lie close before and behind the spline."""
    shape = bend * torch.randn(10, 1, 3 * BINS - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    even = torch.linspace(-7, 7, 20_001, dtype=torch.float64).expand(10, -1)
    y = torch.cat([even, spline(even, shape.expand(-1, even.shape[1], -1))[0]], 1).sort(1)[0]
    noise, log_slope = spline(y, shape.expand(-1, y.shape[1], -1), inverse=True)
    density = (log_slope - 0.5 * (noise.square() + math.log(2 * math.pi))).exp()
    found = torch.cumulative_trapezoid(density, y)
    true = torch.special.ndtr(noise) - torch.special.ndtr(noise[:, :1])
    torch.testing.assert_close(found, true[:, 1:], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[:, -1], torch.ones(10).double(), atol=1e-3, rtol=0)


def test_a_flow_comes_near_the_best_policy_where_all_entries_decide_together() -> None:
    """Rewarded is a half space that lies aslant to every entry; its share of the prior is known, and so is the optimum."""
    size, edge, beta, batch = 8, 1.2, 0.33, 512
    flow, generator = LatentFlow(size, layers=4, width=32), torch.Generator().manual_seed(1)
    read = InitialWeights(flow, 1)
    flow.load_state_dict({name: read(name) for name in flow.state_dict()})
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)

    def reward(latents: Tensor) -> Tensor:
        return (latents.sum(1) > edge * math.sqrt(size)).float()

    def drawn(count: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            latents, _ = flow(torch.randn(count, size, generator=generator))
        return flow(latents=latents), log_normal(latents), reward(latents)

    for _ in range(60):
        log_p, log_reference, found = (each[None] for each in drawn(batch))
        optimizer.zero_grad()
        (policy_loss(log_p, log_reference, found, beta)["loss"] / batch).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    share = 0.5 * math.erfc(edge / math.sqrt(2))
    log_p, log_reference, found = (each.detach() for each in drawn(20_000))
    gap = math.log(1 - share + share * math.exp(1 / beta)) - (found / beta - log_p + log_reference).mean().item()
    assert gap < 0.12, gap  # of layers that move halves 0.3


def test_a_run_that_began_with_layers_of_halves_goes_on_with_them():
    """What it began from does not say which layers there are: all that was written before these did not."""
    new, old = built("vae"), built("vae", without=("flow",))
    kinds = {name: {type(layer) for layer in each.networks["policy"].layers} for name, each in (("new", new), ("old", old))}
    assert kinds == {"new": {Move}, "old": {Coupling}}
    found = {name: tuple(tensor.shape) for name, tensor in old.networks["policy"].state_dict().items()}
    size = math.prod(old.policy.latent_shape)
    assert found["layers.0.hidden.0.weight"][1] == size // 2  # the names and shapes of its checkpoints
    assert found["layers.0.output.weight"][0] == (size - size // 2) * (3 * BINS - 1)
    assert not any("direction" in name for name in found)


def test_classes_are_drawn_by_their_probabilities() -> None:
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.tensor([0.3, -2.0, 1.0])
    shares = drawn_class(torch.special.ndtri(quantiles), logits).bincount() / 100_000
    torch.testing.assert_close(shares, logits.softmax(0), atol=1e-5, rtol=0)


def test_nobody_is_asked_in_the_dry_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setitem(REWARDS.given, "paid", lambda images: asked.append(len(images)) or images.mean((1, 2, 3)))
    objective = built("vae", **{"objective.rewards": [{"name": "paid"}]})
    draws = Draws(1, "policy", 1, torch.arange(2))
    draws.rehearsal = True
    terms = objective.loss(objective.networks, {"sample": torch.arange(2)}, draws)
    assert not asked and terms["reward"] == terms["reward_paid"] == 0 and terms["loss"].requires_grad
    draws.rehearsal = False
    assert objective.loss(objective.networks, {"sample": torch.arange(2)}, draws)["reward"] > 0 and asked == [16]


@pytest.mark.parametrize("name", ["bernoulli", "logistic"])
def test_pixels_are_drawn_as_likely_as_the_likelihood_says(name: str) -> None:
    likelihood, count = LIKELIHOODS[name], 2**20
    location, log_scale = torch.tensor(-0.9), torch.tensor(-1.5)
    drawn = likelihood.drawn(torch.arange(count) / count, location, log_scale)
    values, counts = drawn.unique(return_counts=True)
    torch.testing.assert_close(counts / count, (-likelihood.nats(values, location, log_scale)).exp(), atol=3e-6, rtol=0)
    assert likelihood.shown(values).min() >= 0 and likelihood.shown(values).max() <= 1


def test_gaussian_pixels_have_its_mean_and_deviation() -> None:
    drawn = LIKELIHOODS["gaussian"].drawn(torch.arange(2**20) / 2**20, torch.tensor(0.25), torch.tensor(-1.0))
    assert drawn.isfinite().all()
    torch.testing.assert_close(torch.stack([drawn.mean(), drawn.std()]), torch.tensor([0.25, math.exp(-1)]), atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_reward_minus_divergence() -> None:
    """Of a Bernoulli decoder, where both are known of every pixel."""
    objective = built("vae", **{"model.policy": "decoder", "objective.group": 8000, "objective.beta": 0.01})
    networks, batch = objective.networks, {"sample": torch.arange(2)}
    bias: Tensor = networks["policy"].head.bias
    objective.loss(networks, batch, Draws(1, "policy", 1, batch["sample"]))["loss"].div(2 * 8000).backward()
    found, bias.grad = bias.grad, None
    latents = Draws(1, "policy", 1, batch["sample"]).normal("latent", 3)
    logits, reference = (networks[name](latents)[0].flatten(1) for name in ("policy", "reference"))
    lit = logits.sigmoid()
    divergence = lit * (torch.nn.functional.logsigmoid(logits) - torch.nn.functional.logsigmoid(reference)) \
        + (1 - lit) * (torch.nn.functional.logsigmoid(-logits) - torch.nn.functional.logsigmoid(-reference))
    (0.01 * divergence.sum(1) - lit.mean(1)).mean().backward()
    true = bias.grad
    assert found is not None and true is not None and bias.grad is not None
    assert torch.nn.functional.cosine_similarity(found, true, dim=0) > 0.95 and abs(found.norm() / true.norm() - 1) < 0.1


@pytest.mark.parametrize(("run", "settings", "latent_shape"), [
    ("vae", {}, (3,)), ("grey", {}, (2, 4, 4)), ("vae_gan", {}, (4,)), ("dcgan", {}, (6,)),
    ("dcgan", {"model.label": "3"}, (5,)), ("vae", {"model.policy": "decoder"}, (3,)),
    ("grey", {"model.policy": "decoder"}, (2, 4, 4)),
])  # fmt: skip
def test_every_generator_makes_pictures_of_any_latent(run: str, settings: dict[str, Any],
                                                      latent_shape: tuple[int, ...]) -> None:
    objective = built(run, **settings)
    assert objective.latent_shape == latent_shape and objective.class_names is None
    batch = {"sample": torch.arange(3)}
    terms = objective.loss(objective.networks, batch, Draws(1, "policy", 1, batch["sample"]))
    assert objective.count(batch) == 24 and terms["loss"].requires_grad and terms["loss"].isfinite()
    images = objective.generate(objective.networks, torch.randn(5, *latent_shape))
    assert images.shape == (5, 1, 8, 8) and images.min() >= 0 and images.max() <= 1
    with torch.no_grad():
        found = objective.summarise(objective.evaluate(objective.networks, batch))
    assert math.isfinite(found["gap"]) and found["reward"] == found["reward_brightness"]
    assert objective.preview(objective.networks, 1, torch.device("cpu")).dtype.name == "uint8"


@pytest.mark.parametrize(("run", "settings", "message"), [
    ("dcgan", {"model.policy": "decoder"}, "model.policy: decoder .* generator of dcgan .* has none; use model.policy latent"),
    ("vae_gan", {"model.policy": "decoder"}, "model.policy: decoder .* use model.policy latent"),
    ("gpt", {}, "model.from: gpt is a run of model.family gpt, .* set model.family reward"),
    ("vae", {"objective.group": 1}, "objective.group: 1 picture .* at least 2"),
    ("vae", {"model.label": "3"}, "model.label: 3, but vae is not conditional"),
    ("dcgan", {"model.label": "33"}, r"model.label: '33' is no class of dcgan \(did you mean '3'\?\)"),
    ("vae", {"train.precision": "fp16"}, "train.precision: fp16 is too coarse"),
    ("vae", {"model.policy": "decoder", "model.layers": 3}, "model.layers: 3 has no effect with model.policy decoder"),
    ("vae", {"objective.rewards": [{"name": "exact"}]}, r"objective.rewards\[0\].name: 'exact' does not judge pictures"),
    ("vae", {"objective.rewards": []}, "objective.rewards: names no reward"),
    ("vae", {"objective.rewards": [{"name": "classifier", "run": "moved", "label": "3"}]},
     r"objective.rewards\[0\].run: moved is not what judged when the run began \(none\)"),
])  # fmt: skip
def test_what_has_no_density_or_no_meaning_is_refused(run: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="^" + message):
        built(run, **settings)


def test_a_run_needs_the_one_it_began_from_only_once(genscale: Callable[..., Any], tmp_path: Path) -> None:
    own = {"run.dir": tmp_path, "tracking.wandb": "disabled", "train.precision": "fp32", "train.log_every": 1}
    source = {**{f"model.{key}": value for key, value in MODELS["vae"].items()},
              **{f"data.{key}": value for key, value in DIGITS.items()},
              "run.name": "vae", "train.steps": 1, "train.ema_half_life": 10, "data.validation_images": 8, **own}
    assert genscale("train", *words(source)).code == 0
    policy = {"model.family": "image_reward", "model.from": tmp_path / "vae", "objective.rewards": "[{name: brightness}]",
              "model.layers": 2, "data.validation_groups": 4, "train.global_batch_size": 4, "train.steps": 4,
              "train.checkpoint_every": 2, "run.name": "bright", **own}
    done = genscale("train", *words(policy))
    assert done.code == 0, done.err
    run = tmp_path / "bright"
    *_, last = find_checkpoints(run)
    digest, frozen = last.digest(), last.state()["frozen"]
    assert frozen["vae"]["origin"] == f"{tmp_path / 'vae'}, step 1" and last.networks() == ["policy"]
    shutil.rmtree(last.path)
    shutil.rmtree(tmp_path / "vae")
    done = genscale("train", *words(policy))
    assert done.code == 0, done.err
    assert list(find_checkpoints(run))[-1].digest() == digest
    assert genscale("sample", run, "--count", 4, "--out", tmp_path / "bright.png").code == 0
    assert (tmp_path / "bright.png").is_file()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads(genscale("evaluate", run).out)
    assert report["gap"] == pytest.approx([line["validation_gap"] for line in logged if "validation_gap" in line][-1], rel=1e-4)
    assert {"reward_brightness", "divergence", "flat_groups"} <= logged[0].keys()
    message = genscale("train", *words({**policy, "run.name": "again"})).message_of_run()
    assert message.startswith("model.from: ") and "no checkpoint here" in message


@pytest.mark.parametrize("changes", [{"config": 5}, {"config": {"model": []}}, {"step": "x"}, {"judges": {"a": 5}},
                                     {"classes": "abc"}, {"config": {"model": {"family": ["vae"]}}}], ids=range(6))
def test_a_beginning_of_a_strangers_making_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    own = {"model.family": "image_reward", "model.from": "vae", "objective.rewards": "[{name: brightness}]"}
    config = parse_config(FAMILIES, words(own))
    started = {"config": {"model": MODELS["vae"], "data": DIGITS}, "step": 7, "judges": {}, "classes": None, **changes}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, started=started))
    with pytest.raises(UserError, match="model.started: is not what genscale writes there|is a run of model.family"):
        family("image_reward").restore(config, tmp_path)


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_threes_are_found_by_a_classifier_of_the_images(genscale: Callable[..., Any], genscale_group: Callable[..., Any],
                                                        tmp_path: Path) -> None:
    own = {"run.dir": tmp_path, "tracking.wandb": "disabled", "train.precision": "fp32", "train.log_every": 1}
    source = {**own, "train.steps": 300, "train.checkpoint_every": 0}
    assert genscale("train", "--config", "configs/dcgan/digits.yaml", *words(source)).code == 0
    judge = f"[{{name: classifier, run: {tmp_path}/dcgan-digits, label: '3'}}]"
    policy = ["--config", "configs/reward/digits-threes.yaml", *words({**own, "model.from": tmp_path / "dcgan-digits"})]
    done = genscale("train", *policy, *words({"train.steps": 100, "objective.rewards": judge}))
    assert done.code == 0, done.err
    report = json.loads(genscale("evaluate", tmp_path / "digits-threes").out)
    assert report["reward_best"] + 0.05 > report["reward_classifier"] > 3 * report["reward_before"] > 0
    last = list(find_checkpoints(tmp_path / "digits-threes"))[-1]
    assert set(last.state()["frozen"]) == {"generator", "classifier_1"} and last.networks() == ["policy"]

    few = words({"train.steps": 4, "objective.rewards": judge, "data.validation_groups": 4, "optimizer.name": "sgd"})
    assert genscale("train", *policy, *few, "--run.name", "one").code == 0
    done = genscale_group("train", *policy, *few, "--run.name", "two", "--parallel.strategy", "fsdp2")
    assert done.code == 0, done.err
    one, two = ([line["reward"] for line in map(json.loads, (tmp_path / name / "metrics.jsonl").open()) if "reward" in line]
                for name in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)

    wrong = words({"run.name": "x", "objective.rewards": judge.replace("'3'", "three")})
    message = genscale("train", *policy, *wrong).message_of_run()
    assert message.startswith("objective.rewards[0].label: 'three' is no class of the images")
