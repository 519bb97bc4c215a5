"""The GAN objective on points and images: its terms against the losses written out, packs, micro-batches, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from genscale.data.images.grouped import PackedImageDataSettings, packed
from genscale.data.loader import StepLoader
from genscale.errors import UserError
from genscale.families import family
from genscale.families.dcgan.settings import GANSettings
from genscale.families.points.data import MIXTURES, PointsData, PointsDataSettings
from genscale.families.points.objective import draw_points, modes_and_quality
from genscale.families.points.settings import PointsGANSettings
from genscale.objectives.gan_losses import discriminator_loss, generator_loss
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.rng import Draws
from genscale.settings.config import Config, TrainSettings

SAMPLES = torch.arange(6)


def filled(objective):
    for name, network in objective.networks.items():
        network.to_empty(device="cpu")
        read = objective.initial_weights(name)
        with torch.no_grad():
            for key, tensor in network.state_dict(keep_vars=True).items():
                tensor.copy_(read(key))
    return objective


def points(pack: int = 1, **settings):
    config = Config(model=PointsGANSettings(width=8), data=PointsDataSettings(pack=pack),
                    objective=GANObjectiveSettings(**settings))
    return filled(family("points").build_objective(config, None))


def images(model: dict | None = None, data: dict | None = None, objective: dict | None = None):
    model = {"width": 4, "latent": 3, "discriminator_norm": "none", "generator_norm": "group", **(model or {})}
    config = Config(model=GANSettings(**model),
                    data=PackedImageDataSettings(**{"size": 16, "channels": 1, "validation_images": 100, **(data or {})}),
                    objective=GANObjectiveSettings(**(objective or {})))
    built = family("dcgan").build_data(config.data, 1337)
    return filled(family("dcgan").build_objective(config, built))


def draws(phase: str, samples: torch.Tensor = SAMPLES, step: int = 5) -> Draws:
    return Draws(1337, phase, step, samples)


@pytest.mark.parametrize("name", ["non_saturating", "hinge", "relativistic"])
def test_both_phases_by_hand(name):
    objective = points(loss=name)
    networks = objective.networks
    batch = {"point": torch.randn(6, 2), "sample": SAMPLES}
    fakes = {phase: networks["generator"](draws(phase).normal("noise", 1, 2).flatten(0, 1)) for phase in networks}
    real = networks["discriminator"](batch["point"])
    fake = networks["discriminator"](fakes["discriminator"])
    terms = objective.discriminator_terms(networks, batch, draws("discriminator"))
    torch.testing.assert_close(terms["adversarial"], discriminator_loss(name, real, fake))
    torch.testing.assert_close(terms["real_logit"], real.sum())
    fake = networks["discriminator"](fakes["generator"])
    terms = objective.generator_terms(networks, batch, draws("generator"))
    torch.testing.assert_close(terms["adversarial"], generator_loss(name, fake, real))
    terms["adversarial"].backward()
    assert all(p.grad is not None for p in networks["generator"].parameters())


@pytest.mark.parametrize("source", ["ring", "grid"])
def test_first_kinks_lie_where_the_points_are(source):
    config = Config(model=PointsGANSettings(width=500), data=PointsDataSettings(source=source),
                    objective=GANObjectiveSettings())
    networks = filled(family("points").build_objective(config, None)).networks
    for name, reach in (("generator", 1.0), ("discriminator", {"ring": 0.5, "grid": 8.0}[source] ** 0.5)):
        first = networks[name].hidden[0]
        distances = first.bias.abs() / first.weight.norm(dim=1)  # from the origin to the line where the unit's input is 0
        # A normal of deviation `reach` over a Rayleigh variable: P(distance < d) = d / sqrt(d^2 + reach^2).
        assert distances.median().item() == pytest.approx(reach / 3**0.5, rel=0.15)


def test_of_some_entries_of_a_latent_the_sign_alone_counts():
    config = Config(model=PointsGANSettings(width=8, latent=5, latent_signs=3), data=PointsDataSettings(),
                    objective=GANObjectiveSettings())
    generator = filled(family("points").build_objective(config, None)).networks["generator"]
    latents = torch.randn(50, 5)
    longer = latents * torch.tensor([2.0, 0.1, 7.0, 1.0, 1.0])
    assert torch.equal(generator(latents), generator(longer))
    plain = filled(family("points").build_objective(replace(config, model=replace(config.model, latent_signs=0)), None))
    signs = torch.cat([latents[:, :3].sign(), latents[:, 3:]], 1)
    assert torch.equal(generator(latents), plain.networks["generator"](signs))
    with pytest.raises(UserError, match="model.latent_signs: 6 is more than model.latent, 5; nearest allowed: 5"):
        family("points").build_objective(replace(config, model=replace(config.model, latent_signs=6)), None)


def test_the_discriminators_phase_gives_the_generator_no_gradient():
    objective = points()
    batch = {"point": torch.randn(6, 2), "sample": SAMPLES}
    objective.discriminator_terms(objective.networks, batch, draws("discriminator"))["adversarial"].backward()
    assert all(p.grad is None for p in objective.networks["generator"].parameters())


@pytest.mark.parametrize("settings", [
    {"objective": {"gradient_penalty": 10.0, "loss": "wasserstein"}},
    {"objective": {"r1": 1.0, "r2": 1.0, "augmentation": ["color", "cutout"]}},
    {"model": {"classes": 10}, "data": {"labels": True}},
    {"data": {"pack": 2}},
])
def test_sums_do_not_depend_on_how_a_batch_is_cut(settings):
    objective = images(**settings)
    pack = settings.get("data", {}).get("pack", 1)
    shape = (6, pack, 1, 16, 16) if pack > 1 else (6, 1, 16, 16)
    batch = {"image": torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8)),
             "label": torch.arange(6) % 10, "sample": SAMPLES}
    for phase in objective.phases:
        whole = phase.loss(objective.networks, batch, draws(phase.name))
        cuts = [(SAMPLES[cut], {key: value[cut] for key, value in batch.items()}) for cut in (slice(0, 1), slice(1, 6))]
        parts = [phase.loss(objective.networks, part, draws(phase.name, samples)) for samples, part in cuts]
        assert phase.count(batch) == 6
        for name, value in whole.items():
            torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-4, atol=1e-4)


def test_lazy_regularisation_counts_for_the_steps_between():
    every = points(r1=0.5, regularise_every=1)
    lazy = points(r1=0.5, regularise_every=8)
    batch = {"point": torch.randn(6, 2), "sample": SAMPLES}
    once = every.regularisation_terms(every.networks, batch, draws("regularisation"))["r1"]
    torch.testing.assert_close(lazy.regularisation_terms(lazy.networks, batch, draws("regularisation"))["r1"], 8 * once)
    assert [phase.every for phase in lazy.phases] == [1, 1, 8] and lazy.phases[2].second_order
    assert len(points().phases) == 2 and points(discriminator_steps=5).phases[0].repeats == 5


def test_a_pack_is_seen_side_by_side():
    objective = points(pack=3)
    reals = torch.randn(2, 3, 2)
    seen = []
    networks = {"generator": objective.networks["generator"],
                "discriminator": lambda x, labels: seen.append(x) or objective.networks["discriminator"](x)}
    objective.discriminator_terms(networks, {"point": reals, "sample": SAMPLES[:2]}, draws("discriminator", SAMPLES[:2]))
    (both,) = seen
    torch.testing.assert_close(both[:2], reals.reshape(2, 6))
    latents = draws("discriminator", SAMPLES[:2]).normal("noise", 3, 2)
    for place in range(3):
        torch.testing.assert_close(both[2:, 2 * place : 2 * place + 2], objective.networks["generator"](latents[:, place]))


@pytest.mark.parametrize("pack", [1, 3])
def test_points_are_the_same_on_any_shape_and_after_a_resume(pack):
    def read(world_size: int, batches: int, state: dict | None = None) -> tuple[list, dict]:
        found, states = [], []
        for rank in range(world_size):
            loader = StepLoader(packed(PointsData(PointsDataSettings(), 7), pack), global_batch_size=12, micro_batch_size=3,
                                rank=rank, world_size=world_size, workers=0, prefetch_steps=2, state=state)
            for _ in range(batches):
                for batch in loader.next_batch():
                    found += list(zip(batch["sample"].tolist(), batch["point"].tolist(), strict=True))
            states.append(loader.state())
            loader.close()
        from genscale.data.order import merge_states

        return sorted(found), merge_states(states, 48)

    whole, _ = read(1, 6)
    first, state = read(2, 3)
    rest, _ = read(4, 3, state)
    assert first + rest == whole
    assert np.shape(whole[0][1]) == ((2,) if pack == 1 else (3, 2))


def test_the_mixtures_are_the_published_ones():
    drawn = torch.tensor(np.stack([s["point"] for s in PointsData(PointsDataSettings(source="grid"), 0).validation()]))
    modes, quality = modes_and_quality(drawn, MIXTURES["grid"])
    # Within three deviations in the plane: 1 - exp(-9/2).
    assert modes == 25 and quality == pytest.approx(0.9889, abs=0.01)
    assert sorted({round(float(x)) for x in MIXTURES["grid"].centers.flatten()}) == [-4, -2, 0, 2, 4]
    np.testing.assert_allclose(np.linalg.norm(MIXTURES["ring"].centers, axis=1), 1)
    collapsed = torch.zeros(100, 2) + torch.tensor([0.0, 1.0])
    assert modes_and_quality(collapsed, MIXTURES["ring"]) == (1, 1.0)
    assert modes_and_quality(torch.zeros(10, 2), MIXTURES["ring"]) == (0, 0.0)
    within = draw_points(np.zeros((3, 2)), MIXTURES["ring"])
    for far in (9.0, np.nan):  # what the picture does not show, it says
        assert not np.array_equal(draw_points(np.array([[0, 0], [0, 0], [0, far]]), MIXTURES["ring"])[:30], within[:30])


def test_previews_are_pictures():
    picture = draw_points(MIXTURES["ring"].centers, MIXTURES["ring"])
    assert picture.dtype == np.uint8 and picture.shape == (400, 400, 3) and picture.std() > 5
    objective = images(model={"classes": 10}, data={"labels": True})
    sheet = objective.preview(objective.networks, 0, torch.device("cpu"))
    assert sheet.dtype == np.uint8 and sheet.ndim == 3 and sheet.std() > 5
    assert np.array_equal(sheet, objective.preview(objective.networks, 0, torch.device("cpu")))


def test_a_perfect_generator_scores_near_zero_and_a_dead_one_far():
    objective = images()
    real = torch.from_numpy(np.stack([s["image"] for s in family("dcgan").build_data(
        PackedImageDataSettings(size=16, channels=1, validation_images=170), 0).validation()]))
    features = objective._features(real.float() / 255)
    half = len(real) // 2
    near = objective.summarise({"real_features": features[:half], "fake_features": features[half:]})
    dead = objective.summarise({"real_features": features[:half], "fake_features": features[:1].repeat(half, 1)})
    assert near["loss"] < 0.3 * dead["loss"]
    assert near["diversity"] == pytest.approx(1, abs=0.2) and dead["diversity"] == 0
    gone = objective.summarise({"real_features": features[:half], "fake_features": torch.full_like(features, float("nan"))})
    assert gone["loss"] == float("inf")


@pytest.mark.parametrize(("settings", "message"), [
    ({"model": {"classes": 10}}, "model.classes: 10, but data.source digits has no labels .data.labels true"),
    ({"model": {"classes": 7}, "data": {"labels": True}}, "has 10 classes; set model.classes 10"),
    ({"model": {"classes": 10}, "data": {"labels": True, "pack": 2}}, "data.pack: 2 .*set data.pack 1"),
    ({"data": {"size": 24}}, "data.size: 24 is no power of two"),
    ({"model": {"discriminator_norm": "batch"}, "objective": {"r1": 1.0}}, "objective.r1: 1 .*use group or none"),
    ({"data": {"stack": 3, "labels": True}}, "data.labels=true: an image of data.stack 3 .*set data.labels to false"),
    ({"data": {"stack": 3, "channels": 3}}, "data.stack: 3 lays greyscale .*set data.channels 1"),
    ({"model": {"conditioning": "embedding"}}, "model.conditioning: embedding has no effect with no model.classes"),
    ({"model": {"hidden_layers": 3}}, "model.hidden_layers: 3 has no effect with model.architecture dcgan"),
    ({"objective": {"regularise_every": 4}}, "objective.regularise_every: 4 has no effect with neither objective.r1"),
])
def test_what_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        images(**settings)


@pytest.mark.parametrize("train", [{"micro_batch_size": 1}, {"global_batch_size": 1}])
def test_one_sample_cannot_be_normalised(train):
    config = Config(model=PointsGANSettings(generator_norm="batch"), data=PointsDataSettings(),
                    objective=GANObjectiveSettings(), train=TrainSettings(**train))
    with pytest.raises(UserError, match=f"train.{next(iter(train))}: 1 sample has no deviation"):
        family("points").build_objective(config, None)


def test_a_batch_of_packs_that_is_too_large_says_what_it_takes():
    data = family("dcgan").build_data(PackedImageDataSettings(size=8, channels=1, pack=2), 1)
    data.check(811)
    with pytest.raises(UserError, match="1623 at most .divided by 2: data.pack takes 2 for each of the 812 samples"):
        data.check(812)


@pytest.mark.parametrize("objective", [points, images])
def test_evaluation_is_where_the_networks_are(objective):
    """A batch's sample numbers stay on the CPU when it goes to a device."""
    objective = objective()
    objective._features = torch.nn.Flatten()  # there is no autocast on the meta device
    for network in objective.networks.values():
        network.to("meta")
    key, shape = ("point", (70, 2)) if objective.unit == "points" else ("image", (70, 1, 16, 16))
    batch = {key: torch.empty(shape, dtype=torch.uint8 if key == "image" else None, device="meta"), "sample": torch.arange(70)}
    assert all(values.is_meta for values in objective.evaluate(objective.networks, batch).values())


def test_augmentation_changes_each_image_of_a_pack_by_itself():
    objective = images(data={"pack": 2}, objective={"augmentation": ["color", "translation"]})
    pair = torch.rand(2, 2, 3, 16, 16)
    other = torch.stack([pair[:, 0], torch.rand(2, 3, 16, 16)], 1)
    first, second = (objective._seen(each.flatten(1, 2), draws("discriminator", SAMPLES[:2]), "real") for each in (pair, other))
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.equal(first[:, 3:], second[:, 3:])
    twins = objective._seen(pair[:, :1].repeat(1, 2, 1, 1, 1).flatten(1, 2), draws("discriminator", SAMPLES[:2]), "real")
    assert not torch.equal(twins[:, :3], twins[:, 3:])


def test_batch_normalisation_couples_samples():
    assert images(model={"generator_norm": "batch"}).couples_samples and not images().couples_samples


def test_three_digits_make_one_picture_of_three_channels():
    settings = PackedImageDataSettings(size=8, channels=1, stack=3, pack=2, validation_images=100)
    data = family("dcgan").build_data(settings, 1)
    single = family("dcgan").build_data(PackedImageDataSettings(size=8, channels=1, validation_images=100), 1)
    lane = single.open_lane(5)
    digits = [next(lane)[0]["image"] for _ in range(12)]
    packs = data.open_lane(5)
    (first, _), (second, place) = next(packs), next(packs)
    assert first["image"].shape == (2, 3, 8, 8) and "label" not in first
    assert np.array_equal(np.concatenate([first["image"], second["image"]]).reshape(12, 1, 8, 8), np.stack(digits))
    third = next(data.open_lane(5, place))[0]["image"]
    assert np.array_equal(third[0, 0], next(lane)[0]["image"][0])
    assert np.array_equal(next(data.open_lane(5, data.cursor_at(2)))[0]["image"], third)
    held = np.stack([sample["image"] for sample in data.validation()])
    alone = {sample["image"].tobytes() for sample in single.validation()}
    assert held.shape == (100, 3, 8, 8)
    assert all({picture[channel].tobytes() for picture in held} == alone for channel in range(3))
