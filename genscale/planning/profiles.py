"""What a device can do, as far as the time and the memory of a step depend on it: data sheets, and what was measured beside.

The shipped profiles stand in profiles.json, each with its source. One's own device, and a machine that was calibrated
(`genscale plan --calibrate`), is a file with the same keys: `--gpu mine=profile.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from genscale.errors import UserError, nearest
from genscale.reading import Unreadable, read_json
from genscale.settings.parser import settings_of
from genscale.tracking.peaks import peak_flops

SHIPPED = Path(__file__).with_name("profiles.json")


@dataclass(frozen=True)
class GpuProfile:
    """One kind of device, the node that it stands in, and the constants of the clock (`genscale.planning.time`) for it.

    The five constants `product`, `half`, `attention`, `memory` and `exposed` were fitted on published runs for three kinds of
    GPU (`benchmarks/plan_anchors.py`), are taken over from the most similar of them for the others, and are measured by a
    calibration; `origin` says which.

    Example:
        >>> from genscale.planning.profiles import profile
        >>> h100 = profile("h100")
        >>> round(h100.memory_bytes / 2**30), h100.peak("bf16")
        (79, 989400000000000.0)
    """

    device: str
    """As torch calls it: its peaks are those of `genscale.tracking.peaks`. cpu: the CPU."""
    memory_bytes: PositiveInt
    """What torch finds there in all, free of errors' correction and the driver's own."""
    memory_bandwidth: PositiveFloat
    """Bytes a second, read and written together."""
    multiprocessors: PositiveInt
    """Tiles of a product that are computed at a time."""
    link: PositiveFloat
    """Bytes a second from one device to the others of its node, in one direction."""
    between_nodes: PositiveFloat
    """Bytes a second of one node's network cards together, in one direction."""
    gpus_per_node: PositiveInt
    """Devices of one node."""
    product: PositiveFloat
    """Share of the peak that a large matrix product reaches."""
    half: NonNegativeFloat
    """Inner size at which a product reaches half of that; and half of it is that of its narrower side."""
    attention: PositiveFloat
    """Share of the peak that fused attention reaches over long texts, with heads of 128 and more."""
    memory: PositiveFloat
    """Share of the bandwidth that elementwise work reaches."""
    exposed: NonNegativeFloat
    """Share of an exchange that the step waits for, although computation goes on meanwhile."""
    origin: str
    """Where the five constants come from."""
    spread: PositiveFloat
    """Relative error of a step's time that nine in ten predictions keep."""
    source: str
    """Where the other figures come from."""
    convolution: PositiveFloat = 1.0
    """Convolutions by products of the same size."""
    launch: NonNegativeFloat = 8e-6
    """Seconds of the host for one operation."""
    link_share: PositiveFloat = 0.75
    """Share of `link` that a collective reaches."""
    network_share: PositiveFloat = 0.8
    """Share of `between_nodes` that a collective reaches."""
    latency: NonNegativeFloat = 20e-6
    """Seconds of a collective without data, for each doubling of the ranks."""
    disk: NonNegativeFloat = 0.0
    """Bytes a second written and synced by one process; 0: not known."""
    peaks: dict[str, PositiveFloat] = field(default_factory=dict)
    """FLOP/s by precision, where `genscale.tracking.peaks` does not know the device: what the largest product reached."""
    name: str = ""
    """What the user calls it."""

    def peak(self, precision: str) -> float:
        """Dense FLOP/s at a precision (fp32, bf16, fp16, fp8) that `product` and `attention` are shares of.

        Raises:
            UserError: the device does not compute in it, or nobody knows how fast.
        """
        found = self.peaks.get(precision) or peak_flops(self.device, precision)
        if found is None:
            able = [other for other in ("bf16", "fp16", "fp32") if self.peaks.get(other) or peak_flops(self.device, other)]
            if not able:
                raise UserError(f"{self.name}.peaks: must have FLOP/s by precision, as {{{precision}: 1e14}}, for the device "
                                f"{self.device!r}, which no table knows")
            raise UserError(f"train.precision: {precision} is nothing that {self.name} computes in; use {' or '.join(able)}")
        return found


def profile(name: str) -> GpuProfile:
    """The profile of that name, or that of `NAME=profile.json`.

    Raises:
        UserError: there is none of the name (the nearest is named), or the file has a wrong key.
    """
    called, equals, path = name.partition("=")
    if equals:
        return _own(called, path)
    shipped: dict[str, dict[str, Any]] = read_json(SHIPPED)
    found = shipped.get(_plain(name))
    if found is None:
        raise UserError(f"--gpu: there is no profile {name!r}{nearest(_plain(name), shipped)}; there are "
                        f"{', '.join(shipped)}, and NAME=profile.json is one of your own")
    return GpuProfile(**found, name=_plain(name))


def profile_names() -> list[str]:
    """The shipped profiles."""
    return list(read_json(SHIPPED))


def as_dict(machine: GpuProfile) -> dict[str, Any]:
    """What a file of the profile holds: it is read back equal, but for its name."""
    return {each.name: getattr(machine, each.name) for each in fields(machine) if each.name != "name"}


def _own(called: str, path: str) -> GpuProfile:
    if not called:
        raise UserError(f"--gpu: ={path} has no name before the equals sign; write mine={path}")
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"--gpu: the profile {path} cannot be read: {error.strerror}") from None
    except Unreadable as error:
        raise UserError(f"--gpu: the profile {path} {error}") from None
    made = settings_of(GpuProfile, content, called)
    for share in ("product", "attention", "memory", "exposed", "link_share", "network_share"):
        if getattr(made, share) > 1:
            raise UserError(f"{called}.{share}: is a share, of which 1 is the whole, not {getattr(made, share):g}")
    return replace(made, name=called)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
