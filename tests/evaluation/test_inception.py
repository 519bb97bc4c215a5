"""Inception as its weights file needs it: layout, borders, resizing, and what is said of other files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from genscale.errors import UserError
from genscale.evaluation.image_scores import _scores
from genscale.evaluation.inception import Inception, InceptionFeatures, MixedA, MixedE, resize_as_tensorflow
from genscale.rng import torch_generator


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of pt_inception-2015-12-05-6726825d.pth, which has no counters of batches."""
    network = Inception()
    for name, values in network.state_dict().items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(values, nonlinearity="relu", generator=torch_generator(0, name))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: values for name, values in network.state_dict().items() if "num_batches" not in name}, path)
    return path


def test_the_layout_is_that_of_the_published_file():
    shapes = {name: tuple(values.shape) for name, values in Inception().state_dict().items()}
    # torchvision's inception_v3 has 27,161,264 parameters, 3,326,696 of them in the auxiliary head; here are 8 classes more.
    assert sum(parameter.numel() for parameter in Inception().parameters()) == 27_161_264 - 3_326_696 + 8 * 2049
    assert len([name for name in shapes if name.endswith("conv.weight")]) == 94
    expected = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_4a_3x3.bn.running_var": (192,),
                "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
                "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3), "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
                "Mixed_6b.branch7x7_3.conv.weight": (192, 128, 7, 1), "Mixed_7a.branch7x7x3_2.conv.weight": (192, 192, 1, 7),
                "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1), "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
                "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert expected.items() <= shapes.items()


def test_features_of_grey_and_colour_and_the_files_hash(file):
    network = InceptionFeatures(str(file))
    grey = torch.rand(2, 1, 12, 12, generator=torch_generator(0, "images"))
    features = network(grey)
    assert features.shape == (2, network.width) and features.isfinite().all() and features.min() >= 0
    assert features[0].sub(features[1]).abs().max() > 0.01
    same = (grey[:1].expand(-1, 3, -1, -1) * 255).round() / 255  # seen as 8-bit pixels
    torch.testing.assert_close(network(same), features[:1])
    assert network.identity() == hashlib.sha256(file.read_bytes()).hexdigest()
    scores = _scores(network, *torch.rand(2, 20, 2048, generator=torch_generator(0, "features")))
    assert "fid" in scores and "fd" not in scores


def test_pooling_as_in_the_original():
    """A mean of what is there, also at the border; and the last block takes the largest."""
    images = torch.ones(1, 8, 5, 5)
    images[0, :, 2, 2] = 10
    unit = MixedA(8, 4).eval()
    unit.branch_pool = nn.Identity()
    pooled = unit(images)[0, -8:]
    assert (pooled[:, 0] == 1).all() and (pooled[:, 2, 2] == 2).all()  # with zeros around it, the border would be below 1
    for largest, center, corner in ((False, 2, 1), (True, 10, 1)):
        block = MixedE(8, largest).eval()
        block.branch_pool = nn.Identity()
        pooled = block(images)[0, -8:]
        assert (pooled[:, 1, 1] == center).all() and (pooled[:, 0, 0] == corner).all()
    network = Inception()
    assert [network.Mixed_7b.largest, network.Mixed_7c.largest] == [False, True]


@pytest.mark.parametrize("size", [6, 17])
def test_resizing_as_in_tensorflow_1(size):
    images = torch.rand(2, 3, 9, 9, generator=torch_generator(0, "images"))
    expected = np.zeros((2, 3, size, size))
    for row in range(size):
        for column in range(size):
            y, x = row * 9 / size, column * 9 / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 8), min(left + 1, 8)
            a, b, c, d = (images[:, :, i, j].numpy() for i, j in ((top, left), (top, right), (bottom, left), (bottom, right)))
            upper, lower = a + (b - a) * (x - left), c + (d - c) * (x - left)
            expected[:, :, row, column] = upper + (lower - upper) * (y - top)
    np.testing.assert_allclose(resize_as_tensorflow(images, size).numpy(), expected, rtol=1e-4, atol=1e-6)


class Planted:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def test_other_files_are_refused(file, tmp_path):
    other, text, code = tmp_path / "other.pth", tmp_path / "text.pth", tmp_path / "code.pth"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    text.write_text("no weights")
    torch.save({"fc.bias": Planted()}, code)
    for path, words in ((tmp_path / "none.pth", "cannot be read"), (other, "holds no Conv2d_1a_3x3.conv.weight"),
                        (text, "no file of PyTorch weights"), (code, "no file of PyTorch weights")):
        with pytest.raises(UserError, match=f"--inception: .*{path.name}.*{words}.*pt_inception-2015-12-05-6726825d.pth"):
            InceptionFeatures(str(path))
