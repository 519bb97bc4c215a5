"""The classifier of a run's own images: good enough to tell the classes apart, always the same, trained once."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from genscale.data.images.data import ImageData, ImageDataSettings
from genscale.evaluation.classifier import RECIPE, Classifier, trained_classifier

SETTINGS = ImageDataSettings(size=8, channels=1, labels=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(RECIPE, "steps", 25)


def test_trained_once_and_the_same_whoever_trains_it(tmp_path, capsys):
    data = ImageData(SETTINGS, 0)
    network = trained_classifier(data, 10, tmp_path / "kept", CPU)
    assert network.accuracy(data.validation()) > 0.8
    images = torch.stack([torch.from_numpy(sample["image"]) for sample in data.validation()]) / 255
    assert network(images).square().mean() == pytest.approx(1, rel=0.1)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    (file,) = (tmp_path / "kept").iterdir()
    written = file.stat().st_mtime_ns
    assert trained_classifier(data, 10, tmp_path / "kept", CPU).identity() == network.identity()
    assert file.stat().st_mtime_ns == written
    content = file.read_bytes()
    file.write_bytes(content[:-1000])  # damaged: trained anew
    assert trained_classifier(data, 10, tmp_path / "kept", CPU).identity() == network.identity()
    assert file.read_bytes() == content and len(list((tmp_path / "kept").iterdir())) == 1


def test_other_images_or_another_recipe_are_another_file(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPE, "steps", 1)
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, size=16)):
        trained_classifier(ImageData(settings, 0), 10, tmp_path, CPU)
    monkeypatch.setitem(RECIPE, "lr", 1e-3)
    trained_classifier(ImageData(SETTINGS, 0), 10, tmp_path, CPU)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPE, "steps", 1)
    (tmp_path / "file").write_text("")
    trained_classifier(ImageData(SETTINGS, 0), 10, tmp_path / "file", CPU)
    assert "warning: the classifier cannot be kept" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 40), (3, 256, 256)])
def test_any_size_and_the_same_in_grey_and_colour(shape):
    images = torch.rand(2, *shape)
    network = Classifier(4).eval()
    assert network(images).shape == (2, 64)
    if shape[0] == 1:
        torch.testing.assert_close(network(images), network(images.expand(-1, 3, -1, -1)))
