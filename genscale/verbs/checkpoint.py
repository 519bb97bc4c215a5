"""genscale checkpoint list | verify | digest PATH."""

from __future__ import annotations

import time
from pathlib import Path

from jsonargparse import ArgumentParser

from genscale.config_parser import parse
from genscale.errors import UserError
from genscale.training.checkpoints import Checkpoint, find_checkpoints

ACTIONS = {
    "list": "step, age, size and validity of each",
    "verify": "check every byte against the manifest; exit code 2 if one is damaged",
    "digest": "one SHA-256 over all logical tensors and states, to compare two checkpoints (of a run folder: its latest)",
}


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(prog="genscale checkpoint", description="Look at checkpoints.", exit_on_error=False)
    actions = parser.add_subcommands()
    for name, meaning in ACTIONS.items():
        action = ArgumentParser(exit_on_error=False)
        action.add_argument("path", type=str, help="A checkpoint folder, or a run folder for all of its checkpoints.")
        actions.add_subcommand(name, action, help=meaning)
    parsed = parse(parser, arguments)
    path = Path(parsed[parsed.subcommand].path)
    checkpoints = list(find_checkpoints(path))
    if parsed.subcommand == "digest":
        return _digest(checkpoints[-1])
    problems = [(checkpoint, checkpoint.problem()) for checkpoint in checkpoints]
    for checkpoint, problem in problems:
        print(_line(checkpoint, problem))
    if parsed.subcommand == "verify" and any(problem for _, problem in problems):
        damaged = ", ".join(checkpoint.path.name for checkpoint, problem in problems if problem)
        raise UserError(f"{path}: damaged: {damaged}")
    return 0


def _digest(checkpoint: Checkpoint) -> int:
    problem = checkpoint.problem()
    if problem:
        raise UserError(f"{checkpoint.path}: damaged: {problem}")
    print(checkpoint.digest())
    return 0


def _line(checkpoint: Checkpoint, problem: str | None) -> str:
    size = sum(file.stat().st_size for file in checkpoint.path.rglob("*") if file.is_file())
    age = (time.time() - checkpoint.path.stat().st_mtime) / 60
    validity = "valid" if problem is None else f"DAMAGED: {problem}"
    return f"{checkpoint.path}  {size / 2**20:8.1f} MiB  {age:8.1f} min old  {validity}"
