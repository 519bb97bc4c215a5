"""Weights & Biases: one W&B run for one genscale run, however often it is resumed."""

from __future__ import annotations

import contextlib
import html
import logging
import os
import secrets
import shlex
import string
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from genscale.masking import masked
from genscale.tracking.wandb_id import NAME, read_run_id
from genscale.writing import make_folder, write_whole

INIT_SECONDS = 8
"""Longest wait for the W&B server when a run starts online."""
FINISH_SECONDS = 10
"""Longest wait for the upload of what is left when a run ends online; the rest can be uploaded later with `genscale sync`."""


class Unfinished(Exception):
    """The server did not take everything before the run ended."""


def _run_id(folder: Path) -> str:
    """The W&B run id kept in the folder, made when there is none: a resumed run must continue under the same id."""
    path = folder / NAME
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file() or path.stat().st_size):
        return read_run_id(folder)
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    write_whole(path, run_id + "\n")
    return run_id


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """W&B takes this process's command line into the run's record."""
    arguments = sys.argv
    sys.argv = [masked(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


class WandbTracker:
    """Writes config, metrics and samples to a W&B run whose files lie in `<run folder>/wandb/`.

    Prints nothing, captures no console output and never prompts. Online, starting waits at most `INIT_SECONDS`.

    Raises:
        Exception: whatever stops W&B from starting: an unwritable folder, no credentials, no network (online).

    Attributes:
        sync: the command that uploads what is in the run folder.
    """

    @_masked_arguments()
    def __init__(
        self,
        run_folder: str | Path,
        config: Mapping[str, Any],
        mode: Literal["online", "offline"],
        project: str,
        entity: str | None = None,
    ) -> None:
        run_folder = Path(run_folder).resolve()
        str(run_folder).encode()  # W&B itself would log a traceback for a path that is no UTF-8
        folder = run_folder / "wandb"
        self._folder = folder
        make_folder(folder)  # W&B itself would fall back to a temporary folder without a word, and make a moved run's anew
        run_id = _run_id(folder)
        import wandb  # a second to import: only runs that use it pay

        self._wandb = wandb
        logging.getLogger("wandb").propagate = False  # it narrates every call, and keeps a debug.log of its own
        # Silence must be set up before init: its login step, which reads these settings, would else print and prompt.
        wandb.setup(settings=wandb.Settings(silent=True))
        try:
            self._run = wandb.init(
                dir=str(run_folder),
                mode=mode,
                project=project,
                entity=entity,
                id=run_id,
                name=run_folder.name,
                resume="allow",
                config=dict(config),
                allow_val_change=True,  # a resumed run may change some settings
                settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS),
            )
        except Exception:
            wandb.teardown(1)  # its service would be in the way of another start
            raise
        self.sync = f"genscale sync {shlex.quote(str(run_folder))}"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step; several calls for one step make one W&B row."""
        self._run.log(dict(metrics), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """A sample, shown as preformatted text."""
        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._log_file(step, name, lambda: self._wandb.Html(page))

    def log_image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 `(height, width, 3)`, kept as a PNG."""
        self._log_file(step, name, lambda: self._wandb.Image(image))

    def _log_file(self, step: int, name: str, make: Callable[[], Any]) -> None:
        if self._folder.is_dir():  # W&B would make the folder of a run anew that was moved away
            self._run.log({name: make()}, step=step)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run; a non-zero exit code marks it failed. Raises Unfinished."""
        started = time.monotonic()
        try:
            self._run.finish(exit_code=exit_code)
            if time.monotonic() - started >= FINISH_SECONDS:  # it then comes back without a word
                raise Unfinished(f"the server did not take everything within {FINISH_SECONDS} s of the run's end")
        finally:
            # Offline, finish may return before the file is written; and after a failure W&B would try again at exit and
            # print a traceback. The teardown waits for its service to end, and takes back the exit hook.
            self._wandb.teardown(exit_code)
