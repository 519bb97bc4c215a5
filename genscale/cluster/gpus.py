"""GPUs as Slurm writes them: `8`, `a100:8`, `gpu:a100:8(S:0-1),nvme:1`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from genscale.errors import UserError

_GPU = re.compile(r"(?:^|,)gpu(?::(?P<kind>[A-Za-z_][^:,()]*))?(?::(?P<count>\d+))?(?=[,(]|$)")


@dataclass(frozen=True)
class Gpus:
    """What a job asks for on each node.

    Attributes:
        kind: as the cluster names it, a100; None for any.
        gres: how an old Slurm is asked, `gpu:a100:8,nvme:1`; None where `--gpus-per-node` does.
    """

    count: int
    kind: str | None = None
    gres: str | None = None

    @property
    def option(self) -> list[str]:
        """The options of sbatch that ask for them."""
        if self.gres is not None:
            return [f"--gres={self.gres}"]
        return [f"--gpus-per-node={self.kind + ':' if self.kind else ''}{self.count}"] if self.count else []


def gpus_in(gres: str, kind: str | None = None) -> int:
    """`gpu:a100:8(S:0-1),nvme:1` has 8, of any kind or of that one."""
    return sum(int(found["count"] or 1) for found in _GPU.finditer(gres)
               if kind is None or (found["kind"] or "").lower() == kind.lower())


def kinds_in(gres: str) -> list[str]:
    return [found["kind"] for found in _GPU.finditer(gres) if found["kind"]]


def read_gpus(per_node: str | int | None, gres: str | None, setting: str = "--gpus-per-node",
              gres_setting: str = "--gres") -> Gpus:
    """From `gpus_per_node` and `gres` of a site, or of the flags. A gres without GPUs is one more thing to ask for. Raises
    UserError."""
    match = re.fullmatch(r"(?:(?P<kind>[A-Za-z_][\w.-]*):)?(?P<count>\d+)", str(per_node if per_node is not None else 0))
    if match is None:
        raise UserError(f"{setting}: must be a whole number, not {per_node!r}; or a kind and a number, as a100:4")
    count, kind = int(match["count"]), match["kind"]
    if gres is None:
        return Gpus(count, kind)
    if not isinstance(gres, str) or not re.fullmatch(r"[\w.:,-]+", gres):
        raise UserError(f"{gres_setting}: must be as sbatch takes it, gpu:h100:8, not '{gres}'")
    if not (inside := gpus_in(gres)):
        raise UserError(f"{gres_setting}: {gres} has no GPUs, as gpu:h100:8 has; ask for others with --sbatch=--gres={gres}")
    if len({*kinds_in(gres)}) > 1:
        raise UserError(f"{gres_setting}: {gres} mixes kinds of GPUs, which would wait for each other; name one")
    return Gpus(inside, next(iter(kinds_in(gres)), None), gres)


def with_count(gpus: Gpus, count: int, kind: str | None) -> Gpus:
    """As many others, asked for as these are: an old Slurm stays one."""
    kind = kind or gpus.kind
    if gpus.gres is None:
        return Gpus(count, kind)
    one = f"gpu:{kind + ':' if kind else ''}{count}"
    others = [part for part in gpus.gres.split(",") if part.partition(":")[0] != "gpu"]
    parts = [*([one] if count else []), *others]
    return Gpus(count, kind, ",".join(parts) or None)
