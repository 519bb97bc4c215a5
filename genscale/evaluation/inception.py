"""The Inception network in whose features the Frechet distance is called FID, from a weights file that the user brings."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import UserError

INPUT_SIZE = 299
WIDTH = 2048
LOGITS = 1008
Kernel = int | tuple[int, int]


class ConvUnit(nn.Module):
    """Convolution that keeps the size unless `stride` is 2 or `padded` is False, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel = 1, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(images)), inplace=True)


def _mean_pool(hidden: Tensor) -> Tensor:
    # TensorFlow's mean at the border is over the pixels that are there.
    return F.avg_pool2d(hidden, 3, 1, 1, count_include_pad=False)


class MixedA(nn.Module):
    """1x1, 5x5, two 3x3 and pooling, side by side."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = ConvUnit(inputs, 48), ConvUnit(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(inputs, 64), ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3)
        self.branch_pool = ConvUnit(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        doubled = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), doubled,
                          self.branch_pool(_mean_pool(x))], 1)


class MixedB(nn.Module):
    """Halves the resolution, 288 to 768 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(288, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(288, 64), ConvUnit(64, 96, 3)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        doubled = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), doubled, F.max_pool2d(x, 3, 2)], 1)


class MixedC(nn.Module):
    """7x7 convolutions as rows and columns."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = ConvUnit(768, 192)
        self.branch7x7_1, self.branch7x7_2 = ConvUnit(768, inner), ConvUnit(inner, inner, row)
        self.branch7x7_3 = ConvUnit(inner, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = ConvUnit(768, inner), ConvUnit(inner, inner, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = ConvUnit(inner, inner, row), ConvUnit(inner, inner, column)
        self.branch7x7dbl_5 = ConvUnit(inner, 192, row)
        self.branch_pool = ConvUnit(768, 192)

    def forward(self, x: Tensor) -> Tensor:
        doubled = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        doubled = self.branch7x7dbl_5(self.branch7x7dbl_4(doubled))
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        return torch.cat([self.branch1x1(x), single, doubled, self.branch_pool(_mean_pool(x))], 1)


class MixedD(nn.Module):
    """Halves the resolution, 768 to 1,280 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = ConvUnit(768, 192), ConvUnit(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = ConvUnit(768, 192), ConvUnit(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = ConvUnit(192, 192, (7, 1)), ConvUnit(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class MixedE(nn.Module):
    """Branches that split once more.

    Args:
        largest: pool by the largest value, as the last of these does in the weights' original, where others take the mean.
    """

    def __init__(self, inputs: int, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = ConvUnit(inputs, 320)
        self.branch3x3_1 = ConvUnit(inputs, 384)
        self.branch3x3_2a, self.branch3x3_2b = ConvUnit(384, 384, (1, 3)), ConvUnit(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = ConvUnit(inputs, 448), ConvUnit(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = ConvUnit(384, 384, (1, 3)), ConvUnit(384, 384, (3, 1))
        self.branch_pool = ConvUnit(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        single, doubled = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _mean_pool(x)
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
                          self.branch3x3dbl_3a(doubled), self.branch3x3dbl_3b(doubled), self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Inception v3 as in the graph of 2015-12-05 that FID is defined by (Heusel et al. 2017), with the parameter names of its
    PyTorch port, `pt_inception-2015-12-05-6726825d.pth`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = MixedC(128), MixedC(160), MixedC(160), MixedC(192)
        self.Mixed_7a = MixedD()
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, largest=False), MixedE(2048, largest=True)
        self.fc = nn.Linear(WIDTH, LOGITS)  # in the file, and of no use here

    def forward(self, images: Tensor) -> Tensor:
        """Features `(batch, 2048)` of images fp32 `(batch, 3, 299, 299)` in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


class InceptionFeatures(nn.Module):
    """Images in [0, 1] to Inception's features, in the original's own steps: 8-bit pixels, its resizing, its range.

    Args:
        file: the state dict, `pt_inception-2015-12-05-6726825d.pth` of torch-fidelity and pytorch-fid.

    Raises:
        UserError: no such file, or one that holds something else.
    """

    name = "inception"
    width = WIDTH

    def __init__(self, file: str) -> None:
        super().__init__()
        self.network = Inception().eval().requires_grad_(False)
        self._sha256 = _load(self.network, Path(file))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features fp32 `(batch, 2048)` of images fp32 `(batch, 1 or 3, size, size)` in [0, 1]."""
        pixels = (images.float() * 255).round().expand(-1, 3, -1, -1)
        return self.network((resize_as_tensorflow(pixels, INPUT_SIZE) - 128) / 128)

    def identity(self) -> str:
        """SHA-256 of the weights file."""
        return self._sha256


def _load(network: nn.Module, file: Path) -> str:
    try:
        content = file.read_bytes()
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--inception: {file} cannot be read ({error.strerror or error}); give the file "
                        "pt_inception-2015-12-05-6726825d.pth of torch-fidelity or pytorch-fid") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UserError(f"--inception: {file} is no file of PyTorch weights; give "
                        "pt_inception-2015-12-05-6726825d.pth") from None
    state = state if isinstance(state, dict) else {}
    for name, values in network.state_dict().items():
        if not name.endswith("num_batches_tracked") and getattr(state.get(name), "shape", None) != values.shape:
            raise UserError(f"--inception: {file} holds no {name} of shape {tuple(values.shape)}: it is another network; give "
                            "pt_inception-2015-12-05-6726825d.pth")
    network.load_state_dict(state, strict=False)
    return hashlib.sha256(content).hexdigest()


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear resizing of TensorFlow 1 `(batch, channels, size, size)`: pixel i is read at i times the ratio of the sizes (not
    from pixel centre to pixel centre), without smoothing."""
    for axis in (2, 3):
        length = images.shape[axis]
        places = torch.arange(size, device=images.device, dtype=torch.float32) * (length / size)
        low = places.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (places - low).view(-1, *[1] * (3 - axis))
        images = images.index_select(axis, low) * (1 - share) + images.index_select(axis, high) * share
    return images
