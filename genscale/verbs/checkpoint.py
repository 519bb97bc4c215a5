"""genscale checkpoint list | verify | digest | consolidate PATH."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from genscale.errors import UserError, nearest
from genscale.printable import printable
from genscale.settings.mistakes import empty
from genscale.settings.parser import parse
from genscale.writing import drafted

if TYPE_CHECKING:
    from genscale.checkpoint.checkpoints import Checkpoint

ACTIONS = {
    "list": "step, size, age, validity and place in the data of each, and which are kept as the best or for ever",
    "verify": "check every byte against the manifest; exit code 2 if one is damaged",
    "digest": "one SHA-256 over all logical tensors and states, to compare two checkpoints (of a run folder: its latest)",
    "consolidate": "one network's weights in one safetensors file (of a run folder: its latest)",
}


def parser() -> ArgumentParser:
    """The actions and their flags."""
    verb = ArgumentParser(prog="genscale checkpoint", description="Look at checkpoints.", exit_on_error=False)
    actions = verb.add_subcommands()
    for name, meaning in ACTIONS.items():
        action = ArgumentParser(exit_on_error=False)
        action.add_argument("path", type=str, help="A checkpoint folder, or a run folder for all of its checkpoints.")
        if name == "list":
            action.add_argument("--json", action="store_true", help="One JSON object a line instead of a table.")
        if name == "consolidate":
            action.add_argument("--out", type=str, required=True, help="The file to write; it must not be there yet.")
            action.add_argument("--network", type=str, default=None, help="Which network, where there are several.")
            action.add_argument("--live", action="store_true", help="The weights of the step, also where there is an average.")
        actions.add_subcommand(name, action, help=meaning)
    return verb


def main(arguments: list[str]) -> int:
    parsed = parse(parser(), arguments)
    chosen = parsed[parsed.subcommand]
    if refusal := empty("path", chosen.path):
        raise refusal
    from genscale.checkpoint.checkpoints import find_checkpoints

    checkpoints = list(find_checkpoints(Path(chosen.path)))
    if parsed.subcommand == "digest":
        print(_undamaged(checkpoints[-1]).digest())
    elif parsed.subcommand == "consolidate":
        consolidate(_undamaged(checkpoints[-1]), Path(chosen.out), chosen.network, chosen.live)
    else:
        rows = [describe(checkpoint, checkpoints[-1]) for checkpoint in checkpoints]
        print("\n".join(map(json.dumps, rows)) if chosen.get("json") else table(rows))
        damaged = ", ".join(checkpoint.path.name for checkpoint, row in zip(checkpoints, rows, strict=True) if row["problem"])
        if parsed.subcommand == "verify":
            if damaged:
                raise UserError(f"{chosen.path}: damaged: {damaged}")
            verify_frozen(checkpoints)
    return 0


def _undamaged(checkpoint: Checkpoint) -> Checkpoint:
    if problem := checkpoint.problem():
        raise UserError(f"{checkpoint.path}: damaged: {problem}")
    return checkpoint


def verify_frozen(checkpoints: list[Checkpoint]) -> None:
    """Raises UserError where the run folder's copy of a frozen network is not the one that a checkpoint was trained with."""
    from genscale.checkpoint.frozen_networks import find_copy, recorded_in

    looked_at: set[tuple[str, str]] = set()
    for checkpoint in checkpoints:
        for name, entry in recorded_in(checkpoint).items():
            if (name, entry["sha256"]) not in looked_at:
                find_copy(checkpoint, name)
                looked_at.add((name, entry["sha256"]))


def consolidate(checkpoint: Checkpoint, out: Path, network: str | None, live: bool) -> None:
    """Write the weights and buffers of one network as whole tensors by name: its average where it has one, unless `live`.

    Raises UserError.
    """
    from genscale.checkpoint.tensor_files import write_whole

    names = checkpoint.networks()
    if network is None and len(names) > 1:
        raise UserError(f"--network: {checkpoint.path} holds {', '.join(names)}; say which")
    if network is not None and network not in names:
        raise UserError(f"--network: {network} is not in {checkpoint.path}, which holds {', '.join(names)}"
                        f"{nearest(network, names)}")
    if os.path.lexists(out):
        raise UserError(f"--out: {out} is there already; give another name")
    try:
        with drafted(out) as draft:
            write_whole(draft, checkpoint.weights(network or names[0], averaged=not live))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from None
    print(out)


def describe(checkpoint: Checkpoint, latest: Checkpoint) -> dict[str, Any]:
    """What is to know of a checkpoint, as JSON; of a damaged one, what can be told. The latest says which is the best."""
    about = _or_nothing(lambda: _about(checkpoint))
    every = _or_nothing(lambda: int(checkpoint.config()["train"]["checkpoint_keep_every"])) or 0
    best = _or_nothing(lambda: dict(latest.state()["best"]))
    written = datetime.fromisoformat(about["time"]).timestamp() if "time" in about else checkpoint.path.stat().st_mtime
    known = {"path": str(checkpoint.path), "step": _or_nothing(lambda: checkpoint.step) or None,
             "bytes": sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file()),
             "time": datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
             "age_seconds": max(0.0, time.time() - written), "problem": checkpoint.problem(),
             "best": best.get("step") == checkpoint.step if best else False,
             "kept": bool(every and checkpoint.step % every == 0)}
    return {**known, **{key: value for key, value in about.items() if key not in known}}


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    """What made it. Raises as `_or_nothing` heeds where that is not what `provenance` writes."""
    about = checkpoint.manifest().get("about", {})
    texts = [*(about.get(key, "") for key in ("host", "strategy", "position", "time")), about.get("commit") or "",
             *about.get("versions", {"torch": ""}).values()]
    if not all(isinstance(text, str) for text in texts) or "torch" not in about.get("versions", {"torch": ""}):
        raise ValueError("about")
    if "time" in about:
        datetime.fromisoformat(about["time"]).timestamp()
    if ("strategy" in about) != isinstance(about.get("world_size"), int):
        raise ValueError("world_size")
    return about


def _or_nothing(read: Any) -> Any:
    """What `read` gives, or {} where the file it reads is damaged: `problem` says so."""
    try:
        return read() or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; the state comes last, since it may be long."""
    lines: list[tuple[str, ...]] = [("CHECKPOINT", "SIZE", "AGE", "POSITION", "KEPT AS", "MADE BY", "STATE")]
    for row in rows:
        marks = ", ".join(mark for mark, is_so in (("best", row["best"]), ("every", row["kept"])) if is_so)
        state = f"DAMAGED: {row['problem']}" if row["problem"] else "valid"
        lines.append((row["path"], f"{row['bytes'] / 2**20:,.1f} MiB", _age(row["age_seconds"]), row.get("position", "-"),
                      marks or "-", _maker(row), state))
    lines = [tuple(printable(str(cell)) for cell in line) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = (1, 2)
    return "\n".join("  ".join(cell.rjust(width) if column in right else cell.ljust(width)
                               for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


def _maker(row: dict[str, Any]) -> str:
    """"2 x zero2, torch 2.13.0, commit 1a2b3c4d"; `--json` has all versions."""
    known = [f"{row['world_size']} x {row['strategy']}"] if "strategy" in row else []
    known += [f"torch {row['versions']['torch']}"] if "versions" in row else []
    if row.get("commit"):
        commit, _, dirty = row["commit"].partition("-")
        known.append(f"commit {commit[:8]}{dirty and '-dirty'}")
    return ", ".join(known) or "-"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
