"""A file that the first of several processes makes, and no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""What file systems without them answer: some of networks, FUSE, FAT."""


def give_name(draft: Path, path: Path) -> None:
    """Give a finished draft its name, and remove the draft.

    Where the file system has no hard links, there is a moment in which `path` is there without its content.

    Raises:
        FileExistsError: another process was faster.
        OSError: it cannot be written.
    """
    try:
        os.link(draft, path)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with path.open("xb") as file:
            file.write(draft.read_bytes())
    finally:
        draft.unlink(missing_ok=True)
