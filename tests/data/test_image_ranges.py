"""Pictures of every mode against what was drawn, and of more than 8 bits by the range that their source has."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.data.images.decoding import DamagedImage, Picture, Range, decode
from genscale.errors import UserError

RANDOM = np.random.default_rng(3)
GREY = np.array([[0, 64], [128, 255]], np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "kind"), [
    ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("PA", "TIFF"), ("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"),
    ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("RGB", "BMP"), ("L", "JPEG2000"), ("RGB", "TGA"), ("I;16", "PNG"),
    ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I;16", "JPEG2000"), ("I", "PPM"),
])
def test_every_mode_is_decoded_to_what_was_drawn(mode: str, kind: str) -> None:
    image, expected = Image.fromarray(GREY), GREY
    if mode == "1":
        image, expected = image.convert("1"), np.array([[0, 0], [255, 255]])
    elif mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image.convert("RGB"), srgb, lab, outputMode="LAB")
    elif mode == "PA":
        image = image.convert("P").convert("PA")
    elif mode.startswith("I"):
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    else:
        image = image.convert(mode)
    raw = encoded(image, kind)
    if mode == "I;16B":
        raw = encoded(Image.frombytes("I;16B", (2, 2), (GREY.astype(">u2") * 257).astype(">u2").tobytes()), kind)
    assert Image.open(io.BytesIO(raw)).mode == mode
    found = np.asarray(decode(raw, Picture(2, 3, ranges={"I": Range(0, 65535)})))
    assert found.shape == (2, 2, 3) and np.abs(found.astype(int) - expected[:, :, None]).max() <= 1


SHADES = RANDOM.random((24, 8, 8))
SHADES[:, 0, 0], SHADES[:, 7, 7] = 0, np.linspace(0.2, 1, 24)  # some are dark
DEEP: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "floats": (lambda shades: shades.astype(np.float32), 1),
    "255 as floats": (lambda shades: (shades * 255).astype(np.float32), 255),
    "8 bits in 32": (lambda shades: (shades * 255).round().astype(np.int32), 255),
    "12 bits in 16": (lambda shades: (shades * 4095).round().astype(np.uint16), 4095),
    "16 bits": (lambda shades: (shades * 65535).round().astype(np.uint16), 65535),
    "16 bits in 32": (lambda shades: (shades * 65535).round().astype(np.int32), 65535),
}


def decoded(source: Path, **changes: Any) -> np.ndarray:
    """All images of a source, held out, from the darkest corner to the brightest."""
    settings = ImageDataSettings(source=str(source), validation_source=str(source), size=8, channels=1, lanes=2, **changes)
    samples = [sample["image"][0] for sample in ImageData(settings, 1, for_training=False).validation()]
    return np.stack(sorted(samples, key=lambda pixels: int(pixels[7, 7])))


def folder(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{number:02}.tif", **options)
    return path


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("write", ["folder", "arrays"])
def test_a_sources_values_say_what_is_white(tmp_path: Path, kind: str, write: str, caplog: pytest.LogCaptureFixture) -> None:
    make, white = DEEP[kind]
    pixels = make(SHADES)
    if write == "folder":
        source = folder(tmp_path / "images", pixels)
    else:
        np.savez(source := tmp_path / "a.npz", images=pixels)
    found = decoded(source)
    assert np.abs(found.astype(float) - SHADES * 255).max() <= 0.51 + 255 / white / 2
    assert ("for white (data.value_range sets others)" in caplog.text) == (white != 65535)


@pytest.mark.parametrize(("kind", "ranges"), [("12 bits in 16", {"I;16": [0, 4095]}), ("16 bits", None)])
def test_a_run_does_not_go_on_with_other_shades(tmp_path: Path, kind: str, ranges: dict | None) -> None:
    """Which an earlier version gave those that do not use their bits in full, and a later one may."""
    source = folder(tmp_path / "images", DEEP[kind][0](SHADES))
    assert ImageData(ImageDataSettings(source=str(source), size=8, lanes=2), 1).plan().get("ranges") == ranges


@pytest.mark.parametrize(("pixels", "right"), [
    ((SHADES * 2 - 1).astype(np.float64), SHADES), (SHADES > 0.5, SHADES > 0.5),
    ((SHADES > 0.5).astype(np.int64), SHADES > 0.5),
    ((SHADES * 4095).round().astype(np.int64), SHADES), (SHADES.astype(np.float16), SHADES),
])
def test_arrays_of_other_types(tmp_path: Path, pixels: np.ndarray, right: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=pixels)
    assert np.abs(decoded(tmp_path / "a.npz").astype(float) - right * 255).max() <= 0.7


def test_white_is_0_where_a_tiff_says_so(tmp_path: Path) -> None:
    source = folder(tmp_path / "images", (65535 - SHADES * 65535).astype(np.uint16), tiffinfo={262: 0})
    assert np.abs(decoded(source).astype(float) - SHADES * 255).max() <= 0.6


@pytest.mark.parametrize("pixels", [SHADES * 9e5, SHADES * 100 - 50])
@pytest.mark.parametrize("write", ["folder", "arrays"])
def test_what_cannot_be_told_is_refused_and_can_be_set(tmp_path: Path, pixels: np.ndarray, write: str) -> None:
    pixels = pixels.astype(np.float32)
    if write == "folder":
        source = folder(tmp_path / "images", pixels)
    else:
        np.savez(source := tmp_path / "a.npz", images=pixels)
    with pytest.raises(UserError, match="data.value_range=None: the pictures of .*hold values from .* set data.value_range"):
        decoded(source)
    found = decoded(source, value_range=(float(pixels.min()), float(pixels.max())))
    assert np.abs(found.astype(float) - SHADES * 255).max() <= 0.6


def test_one_brighter_than_its_source_is_named_and_not_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.round(SHADES.repeat(3, 0) * 4095).astype(np.uint16)
    pixels[1] = 65535 * SHADES[1]  # not among those that are looked at
    assert len(decoded(folder(tmp_path / "images", pixels), bad_share=0.5)) == len(pixels) - 1
    assert "01.tif is out of range (values from 0 to " in caplog.text and "and 4095 white; set data.value_range" in caplog.text


@pytest.mark.parametrize(("pixels", "said"), [
    (np.full((8, 8, 4), np.arange(4) * 60, np.uint8).transpose(2, 0, 1),
     "every one of the 4 pictures looked at is of one colour alone"),
    (np.arange(256, dtype=np.uint8).reshape(4, 8, 8) // 20, "the 4 pictures looked at are next to black, with no value above"),
    (np.arange(256, dtype=np.uint8).reshape(4, 8, 8), None),
])
def test_blank_sources_are_warned_of(genscale: Callable, tmp_path: Path, pixels: np.ndarray, said: str | None,
                                     caplog: pytest.LogCaptureFixture) -> None:
    np.savez(tmp_path / "a.npz", images=pixels)
    done = genscale("data", "inspect", "--model.family", "vae", "--data.source", tmp_path / "a.npz", "--data.size", 8)
    assert done.code == 0, done.err
    assert (said is None) == ("looked at" not in caplog.text) and (said or "") in caplog.text


@pytest.mark.parametrize("deep", [False, True])
def test_a_range_that_no_picture_heeds_is_said(tmp_path: Path, deep: bool, caplog: pytest.LogCaptureFixture) -> None:
    pixels = (SHADES > 0.5).astype(np.int32 if deep else np.uint8)
    assert decoded(folder(tmp_path / "images", pixels), value_range=(0, 1)).max() == (255 if deep else 1)
    assert ("data.value_range=[0, 1] has no effect: none of the " in caplog.text) == (not deep)
    assert ("look at the files, which must use the whole range" in caplog.text) == (not deep)


@pytest.mark.parametrize("range_", [None, (0, 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_with_numbers_that_are_none_are_refused(tmp_path: Path, range_: tuple | None, value: float) -> None:
    np.savez(tmp_path / "a.npz", images=np.where(SHADES > 0.5, value, SHADES))
    with pytest.raises(UserError, match="the array images of a.npz is float64 and holds values that are no numbers; replace"):
        decoded(tmp_path / "a.npz", value_range=range_)


def test_numbers_that_are_none_are_named() -> None:
    broken = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(DamagedImage, match="it holds values that are no numbers"):
        decode(encoded(Image.fromarray(broken), "TIFF"), Picture(4, 1))
