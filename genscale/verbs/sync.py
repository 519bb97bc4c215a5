"""genscale sync RUN...: upload to W&B what a run has kept for it, as one W&B run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from jsonargparse import ArgumentParser

from genscale.errors import UserError
from genscale.settings.parser import parse
from genscale.supervise.run_owner import who_has
from genscale.tracking.wandb_lives import join_lives
from genscale.tracking.wandb_server import check_server, uploaded


def main(arguments: list[str]) -> int:
    for run in parse(parser(), arguments).runs:
        sync(Path(run))
    return 0


def parser() -> ArgumentParser:
    """The arguments of the verb."""
    flags = ArgumentParser(prog="genscale sync", exit_on_error=False, description=(
        "Upload to W&B what a run has kept for it in its folder: from a machine with internet, at any time, also while the run "
        "goes on. However often the run was stopped and started, it becomes one W&B run with every step once. Done again, it "
        "brings what has come since."))
    flags.add_argument("runs", type=str, nargs="+", help="Run folders.")
    return flags


def sync(folder: Path) -> None:
    """Upload a run, and say what was new. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a run folder; give one, like runs/demo")
    if folder.resolve() == Path.cwd() and os.path.lexists(folder / "wandb" / "settings"):
        # W&B takes its server, to which the key is sent, from such a file in the folder it is started in.
        raise UserError(f"{folder.resolve()}/wandb/settings would say which server this machine's W&B key is sent to; run this "
                        "from another folder, or remove that file")
    joined = join_lives(folder)
    if joined.rows and who_has(folder):
        del joined.rows[max(joined.rows)]  # more may come to it
    address = _server()
    have = uploaded(address, joined.run)
    with tempfile.TemporaryDirectory(prefix=".sync-", dir=_place(folder)) as place:
        shown = upload(joined.write(Path(place), have))
    new = [step for step in joined.rows if step > have.step]
    rows = f"{len(new):,} row{'' if len(new) == 1 else 's'} up to step {max(new):,}" if new else "nothing new"
    lives = "1 life" if len(joined.lives) == 1 else f"{len(joined.lives)} lives"
    print(f"{folder}: uploaded {rows}, from {lives} of the run{f': {shown}' if shown else ''}", flush=True)


def _server() -> str:
    try:
        return check_server()
    except UserError as error:
        raise UserError(f"{error}; use a machine with internet, where `wandb login` was done") from None


def _place(folder: Path) -> Path | None:
    """Beside the samples, which need then not be copied; where that is read only, the machine's own place."""
    return folder if os.access(folder, os.W_OK) else None


def upload(folder: Path) -> str:
    """Upload a folder as W&B makes one for a run. Returns the run's address, as far as W&B tells it.

    Raises:
        UserError: the server does not take it.
    """
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", "--include-synced", str(folder.resolve())]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, errors="replace", check=False)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    if done.returncode or re.search(r"\bERROR\b|Not authenticated|No runs to sync", said):
        reason = "; ".join(re.findall(r"\bERROR\b (.*)", said)) or " ".join(said.split())
        raise UserError(f"W&B did not take the run: {reason[-400:]}")
    found = re.search(r"https?://\S+/runs/\S+", said)
    return found.group() if found else ""
