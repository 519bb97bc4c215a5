"""The W&B run id that is kept in a run folder, so that a resumed run goes on under the same."""

from __future__ import annotations

import re
from pathlib import Path

from genscale.errors import UserError
from genscale.reading import Unreadable, read_text

NAME = "run_id"
RUN_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


def read_run_id(folder: Path) -> str:
    """What <run folder>/wandb says, and nothing of a file elsewhere: it is sent to W&B.

    Raises:
        OSError: it cannot be read.
        UserError: it is none.
    """
    file = folder / NAME
    try:
        kept = "" if file.is_symlink() else read_text(file, 1024).strip()
    except Unreadable as error:
        raise UserError(f"{file} {error}; it must hold the id of a W&B run: remove it for a new one") from None
    if not RUN_ID.fullmatch(kept):
        raise UserError(f"{file} is {'a link' if file.is_symlink() else 'no id of a W&B run'}; remove it for a new one")
    return kept
