"""Decoding against Pillow's own resize, NumPy's slices and images made for the purpose."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from genscale.data.images.decoding import DamagedImage, Picture, decode, scaled, square

RANDOM = np.random.default_rng(1)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def prepared(raw: bytes | np.ndarray, picture: Picture, draws: np.ndarray | None = None) -> np.ndarray:
    return square(scaled(decode(raw, picture), picture), picture, draws)


@pytest.mark.parametrize(("shape", "size"), [((40, 40), 16), ((40, 40), 40), ((8, 8), 32), ((30, 50), 15), ((61, 20), 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_centre_crop_is_pillows_resize_of_the_middle(shape: tuple[int, int], size: int, channels: int) -> None:
    pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    side = min(shape)
    top, left = (shape[0] - side) / 2, (shape[1] - side) / 2
    how = Image.Resampling.LANCZOS if size < side else Image.Resampling.BILINEAR
    expected = np.asarray(image.resize((size, size), how, box=(left, top, left + side, top + side)))
    expected = expected.reshape(size, size, channels)
    found = prepared(encoded(image), Picture(size, channels))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.array_equal(found, expected.transpose(2, 0, 1))
    assert np.array_equal(prepared(np.asarray(image), Picture(size, channels)), found)


def test_no_crop_is_the_whole_image_stretched() -> None:
    image = Image.fromarray(RANDOM.integers(0, 256, (20, 50, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((10, 10), Image.Resampling.LANCZOS))
    assert np.array_equal(prepared(encoded(image), Picture(10, 3, "none")), expected.transpose(2, 0, 1))


def test_random_crops_are_windows_of_the_scaled_image_and_reach_its_ends() -> None:
    image = Image.fromarray(RANDOM.integers(0, 256, (16, 40), dtype=np.uint8))
    whole, picture = np.asarray(image.resize((20, 8), Image.Resampling.LANCZOS)), Picture(8, 1, "random", flip=True)
    seen = set()
    for draws in RANDOM.random((300, 3), np.float32):
        found = prepared(encoded(image), picture, draws)[0]
        if draws[2] < 0.5:
            found = found[:, ::-1]
        seen.add(next(left for left in range(13) if np.array_equal(found, whole[:, left : left + 8])))
    assert seen == set(range(13))
    tall = prepared(encoded(image.transpose(Image.Transpose.TRANSPOSE)), picture, np.array([0.9, 0.999, 0.9], np.float32))
    assert tall.shape == (1, 8, 8)


def test_a_very_long_image_costs_no_memory() -> None:
    picture = Picture(256, 3, "random")
    assert scaled(decode(encoded(Image.new("RGB", (20_000, 2))), picture), picture).shape == (256, 8 * 256, 3)


def test_transparent_images_lie_on_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 10, 20, 30, 255
    pixels[0, 1] = 100, 0, 200, 128
    expected = [[[10, 20, 30], [177, 127, 227]], [[255] * 3, [255] * 3]]
    found = prepared(pixels, Picture(2, 3)).transpose(1, 2, 0)
    assert np.abs(found.astype(int) - expected).max() <= 1
    grey = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")
    assert prepared(encoded(grey.resize((2, 2), Image.Resampling.NEAREST)), Picture(2, 1))[0].tolist() == [[255, 0]] * 2
    palette = Image.new("P", (1, 1))
    palette.putpalette([9, 9, 9])
    assert prepared(encoded(palette, transparency=0), Picture(1, 3)).ravel().tolist() == [255] * 3
    assert prepared(encoded(palette), Picture(1, 3)).ravel().tolist() == [9] * 3


def test_other_kinds_of_files() -> None:
    deep = Image.fromarray(np.array([[0, 257 * 100], [65535, 257 * 7]], np.uint16))
    assert prepared(encoded(deep), Picture(2, 1))[0].tolist() == [[0, 100], [255, 7]]
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.abs(prepared(encoded(cmyk, "TIFF"), Picture(4, 3))[:, 0, 0].astype(int) - [255, 0, 0]).max() < 3
    smooth = Image.fromarray(np.linspace(0, 255, 512 * 512).reshape(512, 512).astype(np.uint8)).convert("RGB")
    expected = np.asarray(smooth.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    for kind in ("JPEG", "WEBP"):
        found = prepared(encoded(smooth, kind, quality=95), Picture(32, 3))
        assert np.abs(found.astype(int) - expected).mean() < 2
    turned = Image.fromarray(np.array([[0, 255]], np.uint8).repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    left, right = prepared(encoded(turned, "JPEG", exif=exif), Picture(2, 1, "none"))[0, 0].tolist()
    assert left > 200 and right < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_are_named_as_such(kind: str) -> None:
    whole = encoded(Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    decode(whole, Picture(64, 3))
    for raw in (b"", b"no image", whole[: len(whole) // 2], whole[:20]):
        with pytest.raises(DamagedImage):
            decode(raw, Picture(64, 3))
