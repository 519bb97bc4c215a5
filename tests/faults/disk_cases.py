"""Fault 5: disks that are full or read-only, checkpoints that are damaged or of an older version."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from fault_bench import Bench, Case, end, fill, go_on, living, refusal, small_disk, wait_for_step
from fault_campaign import check_same
from fault_runs import wait_for
from safetensors.torch import save_file

from genscale.checkpoint.checkpoints import Checkpoint, list_checkpoints, sha256_of
from genscale.checkpoint.tensor_files import names_in

NEWER = ("accumulation", "collapse", "evaluation_left_out")
"""Parts of state.json that came after format 2."""


def disk_full(bench: Bench, draw: random.Random) -> float:
    """Fault 5: no byte is free for some steps; training goes on, the former checkpoints stay whole, and the weights of the end
    are those of the run that had room. The seconds are those from there being room again to the next whole checkpoint."""
    with small_disk(bench.folder / f"disk-{bench.count}", "64m") as disk:
        run, ballast = bench.run(disk), disk / "ballast"
        with living(run, bench.shape) as life:
            assert wait_for(lambda: run.saved() > 0, life, 0.002), life.output()[-5000:]
            fill(ballast)
            assert wait_for(lambda: "could not be written" in life.output(), life), "it was not full before the end"
            saved = run.latest()
            assert saved is not None
            freed = time.monotonic()
            ballast.unlink()
            wait_for(lambda: run.saved() > saved.step, life, 0.002)
            seconds = time.monotonic() - freed
            output = end(life, 0)
        assert "Traceback" not in output, output[-5000:]
        assert run.latest().digest() == bench.truth.latest().digest()
        assert run.leftovers() == []
    return seconds


def disk_full_while_logging(bench: Bench, draw: random.Random) -> float:
    """Fault 5: no byte is free for some steps, for metrics.jsonl and the logs neither: a warning, training goes on, no line is
    lost. The seconds are those from there being room again to the lines' being written."""
    with small_disk(bench.folder / f"disk-{bench.count}", "64m") as disk:
        run, ballast = bench.run(disk, **{"train.checkpoint_every": 0}), disk / "ballast"
        with living(run, bench.shape) as life:
            wait_for_step(run, life, draw.randint(1, 6))
            fill(ballast)
            assert wait_for(lambda: "metrics.jsonl could not be written" in life.output(), life, 0.005), life.output()[-5000:]
            assert not life.ended(), "it was not full before the end"
            freed = time.monotonic()
            ballast.unlink()
            wait_for(lambda: "metrics.jsonl can be written again" in life.output(), life, 0.005)
            seconds = time.monotonic() - freed
            output = end(life, 0)
        assert "Traceback" not in output and output.count("No space left on device") == 1, output[-5000:]
        assert run.metrics() == bench.truth.metrics()
        assert run.latest().digest() == bench.truth.latest().digest()
        assert run.leftovers() == []
    return seconds


def disk_full_at_start(bench: Bench, draw: random.Random) -> float:
    """Fault 5: a disk that is full, or too small for the checkpoints: refused before a step. The seconds are those to the
    message."""
    full = draw.random() < 0.5
    with small_disk(bench.folder / f"disk-{bench.count}", "64m" if full else "1m") as disk:
        run = bench.run(disk)
        if full:
            fill(disk / "ballast")
        message, seconds = refusal(run, bench.shape)
        words = ["No space left on device"] if full else ["disk full", "MiB free", "train.checkpoint_keep (4)"]
        assert all(word in message for word in ["run.dir", str(run.folder), "--run.dir", *words]), message
        assert run.metrics() == [] and run.saved() == 0
    return seconds


def read_only(bench: Bench, draw: random.Random) -> float:
    """Fault 5: a run is to go on in a folder that has become read-only: refused, and nothing is changed. The seconds are those
    to the message."""
    with small_disk(bench.folder / f"disk-{bench.count}", "64m") as disk:
        run = bench.copy(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
        message, seconds = refusal(run, bench.shape)
        assert all(word in message for word in ("run.dir", str(run.folder), "Read-only file system", "--run.dir")), message
        check_same(run, bench.truth)
    return seconds


def cut_short(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} is damaged" if file.name == "manifest.json" else f"{file.name} has {file.stat().st_size} bytes, not "


def flip_a_bit(file: Path, at: int, bit: int) -> str:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 1 << bit
    file.write_bytes(content)
    return f"{file.name} is damaged (SHA-256 differs)"


def remove(file: Path) -> str:
    file.unlink()
    return f"{file.name} is missing"


def damaged(bench: Bench, draw: random.Random) -> float:
    """Fault 5: of the latest three checkpoints one has a file that was cut short, one a file with a flipped bit, and from one a
    file is missing; the last line of metrics.jsonl is torn. Each is named, and the run goes on from the one before them."""
    run = bench.copy()
    *_, good, first, second, third = list_checkpoints(run.checkpoints)
    at, bit = draw.getrandbits(20), draw.randrange(8)
    kinds: list[Callable[[Path], str]] = [cut_short, lambda file: flip_a_bit(file, at, bit), remove]
    draw.shuffle(kinds)
    reasons = {}
    for checkpoint, damage in zip((first, second, third), kinds, strict=True):
        # The manifest has no digest of its own: what it says of the files is what is verified, not who wrote it and when.
        files = [path for path in sorted(checkpoint.path.rglob("*")) if path.is_file()
                 and (path.name != "manifest.json" or damage in (cut_short, remove))]
        file = draw.choice(files)
        folder = f"{file.parent.name}/" if file.parent != checkpoint.path else ""
        reasons[checkpoint.path] = f"{folder}{damage(file)}"
    run.metrics_file.write_bytes(run.metrics_file.read_bytes()[:-10])
    began = time.monotonic()
    with living(run, bench.shape) as life:
        before = run.metrics_version()
        wait_for(lambda: run.metrics_version() != before and run.step() > good.step, life, 0.005)
        seconds = time.monotonic() - began
        output = end(life, 0)
    for path, reason in reasons.items():
        assert output.count(f"checkpoint {path} is damaged ({reason}") == 1, (path, reason, output[-5000:])
    assert f"continuing from {good.path}" in output and "Traceback" not in output, output[-5000:]
    (aside,) = run.folder.glob("previous-*")
    assert [path.name for path in sorted((aside / "checkpoints").iterdir())] == [path.name for path in sorted(reasons)]
    shutil.rmtree(aside)
    check_same(run, bench.truth)
    return seconds


def older_version(bench: Bench, draw: random.Random) -> float:
    """Fault 5: the checkpoint was written by the version that knew format 1 alone, and neither all of today's settings nor all
    of today's state: the run goes on from it as from its own."""
    run = bench.copy()
    found = list_checkpoints(run.checkpoints)
    chosen = draw.choice(found[-4:-1])
    for later in found[found.index(chosen) + 1 :]:
        shutil.rmtree(later.path)
    make_old(chosen)
    assert chosen.problem() is None
    seconds = go_on(run, bench.shape, time.monotonic())
    check_same(run, bench.truth)
    return seconds


def make_old(checkpoint: Checkpoint) -> None:
    """Format 1: one file of whole tensors each, and nothing about what made it."""
    folder = checkpoint.path
    for kind in ("networks", "optimizers", "averages"):
        for name, parts in names_in(folder / kind).items():
            read = checkpoint.tensors(kind, name)
            whole = {key: read(key).clone() for key in read.keys()}  # noqa: SIM118 - no mapping
            for part in parts:
                part.unlink()
            save_file(whole, folder / kind / f"{name}.safetensors")
    state = {key: value for key, value in checkpoint.state().items() if key not in NEWER}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["guards"], config["optimizer"]["muon_momentum"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    files = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
             for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": checkpoint.step, "files": files}, indent=1))


CASES: dict[str, Case] = {
    "5 disk full while saving": disk_full, "5 disk full while logging": disk_full_while_logging,
    "5 disk full at the start": disk_full_at_start, "5 read-only folder": read_only,
    "5 checkpoint files cut short, bit-flipped, missing": damaged, "5 checkpoint of an older version": older_version,
}  # fmt: skip
