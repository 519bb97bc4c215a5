"""The GPUs of a node: what the driver says of them, and whether they still compute."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from genscale.cluster.checks import Check, count_of, host_name
from genscale.cluster.promised_devices import DRIVER_SECONDS, promised_gpus

QUERY: tuple[str, ...] = ("index", "name", "driver_version", "memory.total", "memory.used",
                          "ecc.errors.uncorrected.volatile.total")
PRODUCT = 2048
"""Rows and columns of the matrices that a GPU multiplies."""


def check_driver() -> Iterator[Check]:
    """The GPUs that the driver shows, against those that Slurm gave; faults and leftovers on them."""
    promised, tool = promised_gpus(), shutil.which("nvidia-smi")
    if tool is None:
        found = "no nvidia-smi here" if promised else "none: a run computes on the CPU, over gloo"
        yield Check("GPUs", "ok", found, host=host_name())
        return
    try:
        asked, fields = _ask(tool, QUERY), QUERY
        if "not a valid field" in asked.stdout + asked.stderr:  # drivers differ in how they count memory errors
            asked, fields = _ask(tool, QUERY[:-1]), QUERY[:-1]
    except subprocess.TimeoutExpired:
        yield _fault(f"nvidia-smi did not answer within {DRIVER_SECONDS} s")
        return
    rows = [dict(zip(fields, map(str.strip, line.split(",")), strict=True)) for line in asked.stdout.splitlines()
            if line.count(",") == len(fields) - 1]
    if asked.returncode or not rows:
        yield _fault(f"nvidia-smi: {' '.join((asked.stderr or asked.stdout).split())[:200] or 'shows no GPU'}")
    elif len(rows) < promised:
        yield _fault(f"Slurm gave {count_of(promised, 'GPU')}, and the driver shows {len(rows)}")
    else:
        yield from _faults_of(rows)


def _ask(tool: str, fields: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"], capture_output=True,
                          text=True, timeout=DRIVER_SECONDS, check=False)


def _faults_of(rows: list[dict[str, str]]) -> Iterator[Check]:
    names = sorted({f"{row['name']} ({int(row['memory.total']):,} MiB)" if row["memory.total"].isdigit() else row["name"]
                    for row in rows})
    found = f"{len(rows)} x {', '.join(names)}, driver {rows[0]['driver_version']}"
    broken = [row["index"] for row in rows if row.get(QUERY[-1], "0") not in ("0", "[N/A]", "[Not Supported]", "N/A")]
    if broken:
        yield _fault(f"{found}; uncorrected memory errors on GPU {', '.join(broken)}")
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = [row for row in rows if visible is None or row["index"] in visible.split(",")]
    used = [f"{row['memory.used']} MiB of GPU {row['index']}" for row in mine
            if row["memory.used"].isdigit() and row["memory.total"].isdigit()
            and int(row["memory.used"]) > max(2048, int(row["memory.total"]) // 20)]
    if used:
        yield Check("GPUs", "warning", f"{found}; in use already: {', '.join(used)}", "end what has been left running there "
                    "(nvidia-smi names the processes), or leave the node out", host_name())
    else:
        yield Check("GPUs", "ok", found, host=host_name())


def check_computing(local_rank: int | None = None) -> Iterator[Check]:
    """GPUs multiply matrices whose product is known, and it is said how fast.

    Args:
        local_rank: of this process among those of the node, each of which looks at its own GPU; None: all GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            yield Check("torch", "failure", f"torch {torch.__version__} sees no GPU, and there is a driver",
                        "install the build of torch for this driver's CUDA", host_name(), of_node=True)
        elif not local_rank:
            yield Check("torch", "ok", f"{torch.__version__}, on the CPU", host=host_name())
        return
    count = torch.cuda.device_count()
    for index in range(count) if local_rank is None else [local_rank % count]:
        name = torch.cuda.get_device_name(index)
        rate = _multiply(index)
        if rate is None:
            yield _fault(f"GPU {index} ({name}) computes wrong products")
        else:
            yield Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}, GPU {index} ({name}): {rate:,.0f} "
                        "TFLOP/s in fp16", host=host_name())


def _multiply(index: int) -> float | None:
    """TFLOP/s of a GPU; None where a product is wrong."""
    import torch

    from genscale.planning.measure import product_seconds

    ones = torch.ones(PRODUCT, PRODUCT, device=torch.device("cuda", index), dtype=torch.float16)
    rate = 2 * PRODUCT**3 / product_seconds(ones, ones, seconds=0.01) / 1e12
    return rate if bool(((ones @ ones) == PRODUCT).all()) else None


def _fault(found: str) -> Check:
    return Check("GPUs", "failure", found, "have the node drained, and leave it out (--exclude)", host_name(), of_node=True)
