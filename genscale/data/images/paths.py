"""Images that a table names by their path: followed only to where the table itself is, its folder or its hub dataset.

Tables come from strangers. Followed anywhere, a path would make training data of any file of this machine, and send the user's
token to any address.
"""

from __future__ import annotations

import re
from pathlib import Path

from genscale.data.readers import TableShard
from genscale.data.source_file import is_url
from genscale.data.web import AGAIN
from genscale.errors import UserError

INSTEAD = "write the image's bytes into the table"


def content_at(path: str, shard: TableShard, row: str) -> bytes:
    """The image file at a path that a table has in the place of bytes.

    Args:
        shard: the table.
        row: what to call the row.

    Raises:
        UserError: the path leads out of the table's folder or its hub dataset, or to no file.
    """
    where = f"{shard.spec.key}={shard.spec.name}: {row} names the file {path}"
    if shard.file is None:
        return _of_hub(path, shard.spec.name, where)
    if is_url(shard.file.path):
        raise UserError(f"{where}, which is not read for a table at a URL; {INSTEAD}")
    return _beside(path, Path(shard.file.path).parent, where)


def _beside(path: str, folder: Path, where: str) -> bytes:
    try:
        root = folder.resolve()
        found = (root / path).resolve()
        if not found.is_relative_to(root):
            raise UserError(f"{where}, which is not in the table's folder {root}; put the images there, or {INSTEAD}")
        if not found.is_file():  # nor a pipe, which would be waited for
            raise UserError(f"{where}, which is not there; put it back, and start again: {AGAIN}")
        return found.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # of a circle of links, or a path that is none
        raise UserError(f"{where}, which cannot be read ({error}); mend that, or {INSTEAD}") from None


def _of_hub(path: str, dataset: str, where: str) -> bytes:
    from datasets.utils.file_utils import xopen

    # Before `::` stands what is opened within what follows: there, anything but a member of a zip could lead elsewhere.
    own = re.fullmatch(rf"(zip://[^:]*::)?hf://datasets/{re.escape(dataset)}@[^:]+", path)
    if not own or ".." in path.split("/"):
        raise UserError(f"{where}, which is not in the hub dataset {dataset}; {INSTEAD}, or give a local copy of the images")
    try:
        with xopen(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{where}, which is not there; {INSTEAD}, or give a local copy of the images") from None
