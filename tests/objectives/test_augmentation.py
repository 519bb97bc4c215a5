"""Differentiable augmentation: what each kind does to an image, addressed by sample, with gradients."""

from __future__ import annotations

import pytest
import torch

from genscale.objectives.augmentation import augment
from genscale.rng import Draws


def draws(samples: list[int]) -> Draws:
    return Draws(0, "discriminator", 3, torch.tensor(samples))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kinds", [["color"], ["translation"], ["cutout"], ["color", "translation", "cutout"]])
def test_a_sample_is_changed_alike_in_any_micro_batch(images, kinds):
    whole = augment(images, kinds, draws(list(range(6))), "real")
    alone = augment(images[4:5], kinds, draws([4]), "real")
    torch.testing.assert_close(alone, whole[4:5])
    assert not torch.equal(whole, augment(images, kinds, draws(list(range(6))), "fake"))


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
def test_gradients_pass_and_are_those_of_finite_differences(images, kind):
    small = images[:2, :, :4, :4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, [kind], draws([0, 1]), "real"), small)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, [kind], draws([0, 1]), "real"), small)


def test_translation_moves_by_at_most_an_eighth(images):
    numbered = torch.arange(1.0, 257).reshape(1, 1, 16, 16).expand(40, 1, 16, 16)
    moved = augment(numbered, ["translation"], draws(list(range(40))), "real")
    seen = set()
    for image in moved[:, 0]:
        rows, columns = image.nonzero(as_tuple=True)
        before = image[rows[0], columns[0]].long() - 1
        shift = (int(rows[0] - before // 16), int(columns[0] - before % 16))
        # All that is not grey was moved by the same.
        wanted = torch.zeros(20, 20)
        wanted[2 + shift[0] : 18 + shift[0], 2 + shift[1] : 18 + shift[1]] = numbered[0, 0]
        assert torch.equal(image, wanted[2:18, 2:18])
        seen.add(shift)
    assert {abs(s) for pair in seen for s in pair} == {0, 1, 2}


def test_cutout_covers_a_square_of_half_the_side(images):
    cut = augment(torch.ones(40, 1, 16, 16), ["cutout"], draws(list(range(40))), "real")
    sizes = {int((image == 0).sum()) for image in cut}
    assert max(sizes) == 64 and min(sizes) >= 16
    for image in cut[:, 0]:
        rows, columns = (image == 0).nonzero(as_tuple=True)
        assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)


def test_color_keeps_the_shapes_in_the_image(images):
    """Brightness, saturation and contrast are affine in each channel's offset from grey: differences keep their sign."""
    changed = augment(images, ["color"], draws(list(range(6))), "real")
    grey, before = changed.mean(1).flatten(1), images.mean(1).flatten(1)
    for a, b in zip(grey, before, strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999
    assert (changed - images).abs().flatten(1).amax(1).min() > 0.01
