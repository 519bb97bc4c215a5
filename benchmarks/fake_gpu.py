"""A GPU that is not there: a CUDA build of torch does on it what it would do on an H100, but for computing.

What is on the device are tensors without values, which take CUDA's own way through torch: its casts, its kernels, its streams.
What is on the host is real. Whatever the device would send back is ones. See fake_gpu.c for what stands in the place of CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import genscale  # noqa: F401

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_suffix(".c")
LIBRARY = "libcuda.so.1"
"""What the driver is called, which torch loads by this name."""
aten = torch.ops.aten
NO_WORK = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
READ = {aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._local_scalar_dense.default}
"""Operations whose results the host waits for."""


def missing() -> str | None:
    """What a stand-in would take and is not here, if anything."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if shutil.which("cc") is None:
        return "no C compiler (cc)"
    wanted = "driver_types.h", "crt/host_defines.h"
    absent = [name for name in wanted if not any((folder / name).exists() for folder in _headers())]
    return f"CUDA's headers are not installed ({', '.join(absent)})" if absent else None


def _headers() -> list[Path]:
    """Folders in which the packages that torch comes with, or an installation of CUDA, may keep CUDA's headers; those of
    torch's own version first."""
    found = [Path("/usr/local/cuda/include")]
    for package, folders in (("triton", ["backends/nvidia/include"]), ("nvidia", ["cuda_runtime/include", "cu13/include"])):
        spec = importlib.util.find_spec(package)
        places = spec.submodule_search_locations or [] if spec else []
        found += [Path(place) / folder for place in places for folder in folders]
    return found[::-1]


def environment(folder: Path) -> dict[str, str]:
    """That of a process which takes the stand-in for its GPU; the library is made in the folder."""
    library = folder / LIBRARY
    headers = [f"-I{each}" for each in _headers()]
    subprocess.run(["cc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", *headers, "-o", library, SOURCE], check=True)
    # What genscale would set asks the driver for memory, page by page.
    return {**os.environ, "LD_PRELOAD": str(library), "PYTORCH_ALLOC_CONF": "expandable_segments:False"}


class Watch(TorchDispatchMode):
    """Inside a `FakeTensorMode`: keeps what is on the host real, and notes what is asked of the device.

    Attributes:
        operations: by name, those that a device would be given (views are none).
        casts, layouts: how many of these change the type of a tensor, or bring one of four dimensions into another order.
        waits: what the host would wait for, and where in genscale.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Begin to count."""
        self.operations, self.casts, self.layouts = Counter[str](), 0, 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function.namespace == "prim":
            return function(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if function is aten._pin_memory.default:
            return args[0].clone()
        if function is aten.is_pinned.default:
            return True
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        if _stays_on_host(given, kwargs.get("device")):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function in READ:
            self._note_wait(function, given[0])
        args = _with_known_places(function, args)
        out = _answer(function, args) if function in READ else function(*args, **kwargs)
        if function in (aten._to_copy.default, aten.copy_.default):
            return self._copied(function, args, kwargs, out)
        self._count(function, given, out)
        return _on_host(out) if isinstance(out, FakeTensor) and out.device.type == "cpu" else out

    def _copied(self, function: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor) -> Tensor:
        source, target = (args[0], out) if function is aten._to_copy.default else (args[1], args[0])
        if not (kwargs.get("non_blocking") or args[2:]) and source.device != target.device and source.ndim:
            self._note_wait(function, source)
        self._count(function, [source], target)
        if target.device.type == "cpu":
            return target if not isinstance(target, FakeTensor) else getattr(source, "sent", _on_host(target))
        if not isinstance(source, FakeTensor):
            with unset_fake_temporarily():
                out.sent = source.to(out.dtype)  # type: ignore[attr-defined]  # read once more, it is what it was
        return out

    def _count(self, function: Any, given: list[Tensor], out: Any) -> None:
        name = function.name().split("::")[1].split(".")[0]
        if function.is_view or name in NO_WORK:
            return
        self.operations[name] += 1
        if name in ("_to_copy", "copy_", "clone") and isinstance(out, Tensor) and given:
            source = given[-1] if name == "copy_" else given[0]
            self.casts += source.dtype != out.dtype
            self.layouts += source.ndim == 4 and _order(source) != _order(out)

    def _note_wait(self, function: Any, tensor: Tensor) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/genscale/" in frame.filename]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:]))
        self.waits.append(f"{function.name().removeprefix('aten::')} of {tuple(tensor.shape)} in {where}")


def _stays_on_host(given: list[Tensor], device: Any) -> bool:
    if any(isinstance(each, FakeTensor) for each in given):
        return False
    devices = [torch.device(device)] if device is not None else [each.device for each in given]
    return all(each.type in ("cpu", "meta") for each in devices)


def _on_host(tensor: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def _answer(function: Any, args: Any) -> Any:
    if function is aten._local_scalar_dense.default:
        with unset_fake_temporarily():
            return _on_host(args[0]).item()
    if function is aten.equal.default:
        return True
    return args[0].new_zeros((args[0].numel(), args[0].ndim) if function is aten.nonzero.default else (args[0].numel(),))


def _with_known_places(function: Any, args: Any) -> Any:
    """Of a selection by flags nobody knows how long it is: here all flags are set."""
    if function is not aten.index.Tensor or not any(each is not None and each.dtype == torch.bool for each in args[1]):
        return args
    places: list[Tensor | None] = []
    for each in args[1]:
        is_flags = each is not None and each.dtype == torch.bool
        places += [each.new_zeros(each.numel(), dtype=torch.int64) for _ in each.shape] if is_flags else [each]
    return args[0], places


def _order(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@contextmanager
def fake_gpu() -> Iterator[Watch]:
    """Inside, what is put onto the device has no values; in a process with `environment`."""
    torch.autograd.set_multithreading_enabled(False)  # a thread of the device's own would not be watched
    watch = Watch()
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch
