"""The code that a job is submitted with, kept for all of its lives: what becomes of the checkout between two of them (an edit,
`git pull`, a file that is gone) changes nothing.

    <run folder>/jobs/code-<digest>/    genscale/, launch/ddp.yaml where the job's script reads it, __main__.py, commit

`python <that folder>` is `genscale` with that code. The jobs of a run, and all the runs of an array, share one folder as long
as the code is the same. It belongs to the run folder and goes with it; before that nothing removes it, and it may be removed
by hand once the run has no job.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import genscale
from genscale.checkpoint.code_version import COMMIT_FILE, ROOT, commit_of
from genscale.cluster.before_submission import LAUNCH_FILE
from genscale.errors import UserError
from genscale.writing import make_folder, write_whole

LARGEST, MOST = 32 * 2**20, 10_000
"""Bytes, and files, of the package: it has 2 MB in 300."""
MAIN = "__main__.py"
# Python would look for genscale in the folder that a process starts in first: for `python -m`, and for the fork server that the
# data's workers come from.
START = '''\
"""`python FOLDER` is `genscale`, with the code of this folder, wherever it is started."""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONSAFEPATH"] = "1"
    from genscale.cli import start

    start()
'''


@dataclass(frozen=True)
class Snapshot:
    """Code, as it was read.

    Attributes:
        run: folder of the run, or of the array, that it is for.
        files: content by path in the folder.
        commit: of the checkout they are of.
    """

    run: Path
    files: dict[str, bytes]
    commit: str | None

    @property
    def digest(self) -> str:
        total = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            total.update(f"{len(name)} {name} {len(content)} ".encode() + content)
        return total.hexdigest()[:12]

    @property
    def place(self) -> Path:
        """Where it is to be kept."""
        return self.run / "jobs" / f"code-{self.digest}"

    def keep(self) -> Path:
        """Have it in the run folder, whole. A folder of that name that holds something else by now is left to whoever uses it.

        Returns: where it is. Raises OSError where it cannot be written, and then nothing is left of it.
        """
        place = self.place
        make_folder(place.parent, parents=True)
        for number in itertools.count(2):
            if self._write(place) or self._is_in(place):
                # Said anew: a commit that has the same code names it as well.
                write_whole(place / COMMIT_FILE, f"{self.commit or ''}\n")
                return place
            place = place.with_name(f"code-{self.digest}-{number}")
        raise AssertionError

    def _is_in(self, place: Path) -> bool:
        """Whether it is there already, and still as it was."""
        try:
            return not place.is_symlink() and {**dict(_files(place)), COMMIT_FILE: b""} == {**self.files, COMMIT_FILE: b""}
        except (OSError, UserError):  # it has grown, or cannot be read
            return False

    def _write(self, place: Path) -> bool:
        """Whole, or not at all; False where there is something already."""
        if os.path.lexists(place):
            return False
        draft = place.with_name(f".{place.name}-{secrets.token_hex(6)}")
        try:
            for name, content in self.files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                (draft / name).write_bytes(content)
            os.rename(draft, place)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not place.is_dir():
                raise
            return False  # another submission was first
        return True


def take(run: Path, with_launch_file: bool) -> Snapshot:
    """The code that runs here, as it lies on the disk, changes that were not committed included.

    Args:
        run: folder of the run, or of the array, that it is for.
        with_launch_file: whether the job starts with `accelerate launch`, which reads one.

    Raises:
        UserError: it cannot be read, there is far too much of it, or no Python could be led to where it is to be kept.
    """
    if os.pathsep in os.path.abspath(run):
        raise UserError(f"run.dir: {run} has a colon, and Python would not find the job's copy of the code there; choose "
                        "another, or submit with --no-snapshot")
    package = ROOT / genscale.__name__
    try:
        files = {f"{genscale.__name__}/{name}": content for name, content in _files(package)}
        if with_launch_file:
            files[str(LAUNCH_FILE)] = (package / LAUNCH_FILE).read_bytes()
    except OSError as error:
        raise UserError(f"--no-snapshot: the code cannot be kept with the job, for {error.filename} cannot be read "
                        f"({error.strerror}); mend that, or submit with --no-snapshot") from None
    return Snapshot(run, {**files, MAIN: START.encode()}, commit_of(ROOT))


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """What lies in it but for what Python and people keep beside code: relative path and content. Raises UserError, OSError."""
    size = count = 0
    for above, below, names in os.walk(folder, followlinks=True, onerror=_raise):
        below[:] = [name for name in below if name != "__pycache__" and not name.startswith(".")]
        for name in names:
            path = Path(above, name)
            if name.startswith(".") or path.suffix == ".pyc" or not path.is_file():
                continue
            relative = path.relative_to(folder).as_posix()
            size, count = size + path.stat().st_size, count + 1
            if size > LARGEST or count > MOST:
                raise UserError(f"--no-snapshot: {folder} has more than {LARGEST >> 20} MiB or {MOST:,} files (as far as "
                                f"{relative}), too much to keep a copy with the job; move what is no code out of it, or submit "
                                "with --no-snapshot")
            yield relative, path.read_bytes()


def _raise(error: OSError) -> None:
    raise error
