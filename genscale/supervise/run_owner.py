"""One run at a time in a run folder: the second is refused, and a run that was taken for dead can do no harm.

    <run folder>/.owner/00000003.json     who has the folder: token, host, process, job, since when

Each claim makes the next number, which the file system gives to one process only; the highest number is the owner. Claims are
never deleted before a higher one is there, so no two starters can both find the folder free. The owner touches its file every
few seconds. It is dead when its process is gone (the same machine), or when its file has not been touched for a minute by the
file server's own clock (another machine, a reboot, a copy of the folder): no lock outlives its run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from genscale.errors import UserError
from genscale.reading import read_json
from genscale.supervise.exclusive_file import give_name
from genscale.writing import make_folder, write_whole

BEAT_SECONDS = 5.0
"""Between two touches of the owner's file."""
STALE_SECONDS = 60.0
"""An owner on another machine that has not touched its file for so long is dead."""
_KEYS = {"token", "host", "pid", "started", "boot", "pids", "job", "restart", "folder"}
"""The keys of a claim."""
EMPTY_SECONDS = 1.0
"""After which an owner's file without content is one that nobody is writing."""


class Fenced(UserError):
    """Another process has taken the run folder over: this one must not write there any more."""


class FolderGone(FileNotFoundError):
    """The run folder was moved or deleted: what is written by its name would be nobody's.

    Attributes:
        now: where it is now; None where it was deleted, or where that cannot be told.
    """

    def __init__(self, run_folder: Path, now: Path | None) -> None:
        what = f"was moved to {now}" if now else "was moved or deleted"
        super().__init__(errno.ENOENT, f"{run_folder} {what} while the run goes on", str(run_folder))
        self.now = now


class RunOwner:
    """The right to write into a run folder, held by rank 0 of a run.

    Raises:
        UserError: another run that lives has the folder.
        OSError: the folder cannot be written.

    Args:
        say: told in a line that the claim takes a while, and why.

    Attributes:
        number: of the claim.
    """

    def __init__(self, run_folder: Path, say: Callable[[str], None]) -> None:
        self.run_folder, self._say = run_folder, say
        self._folder = run_folder / ".owner"
        make_folder(self._folder)
        self._opened = os.open(run_folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # follows it wherever it is moved
        self._mine = {"token": secrets.token_hex(8), **_this_process(), "folder": run_folder.stat().st_ino,
                      "since": datetime.now(UTC).isoformat(timespec="seconds")}
        try:
            self.number = self._claim()
        except BaseException:
            os.close(self._opened)
            raise

    def beat(self) -> None:
        """Show that this run lives. Raises what `check` raises; OSError where the file cannot be touched."""
        self.check()
        os.utime(self._file(self.number))

    def check(self) -> None:
        """Raises Fenced where another process has taken the folder over, FolderGone where it is not in its place any more, and
        OSError where that cannot be told."""
        latest = self._latest()
        if latest < self.number or not self._is_in_its_place(self.run_folder):
            raise FolderGone(self.run_folder, self._moved_to())
        if latest == self.number and (_read(self._file(latest)) or self._mine)["token"] == self._mine["token"]:
            return
        other = _read(self._file(latest)) or {}
        raise Fenced(f"run.name: {self.run_folder} was taken over by {_describe(other)}, which took this run for dead; "
                     "this one ends without writing there")

    def release(self) -> None:
        """The folder is free, wherever it is now. Once more does nothing."""
        if self._opened < 0:
            return
        with contextlib.suppress(OSError, Fenced):
            folder = self._folder
            try:
                self.check()
            except FolderGone as gone:
                if gone.now is None or latest_claim(gone.now) != self.number:
                    raise
                folder = gone.now / self._folder.name
            write_whole(folder / self._file(self.number).name, json.dumps({**self._mine, "released": True}, indent=1))
        os.close(self._opened)
        self._opened = -1

    def _is_in_its_place(self, place: Path) -> bool:
        try:
            return os.path.samestat(os.stat(place), os.fstat(self._opened))
        except FileNotFoundError:
            return False

    def _moved_to(self) -> Path | None:
        now = Path(_link(f"/proc/self/fd/{self._opened}"))
        with contextlib.suppress(OSError):
            return now if now.is_absolute() and self._is_in_its_place(now) else None
        return None

    def _claim(self) -> int:
        while True:
            latest = self._latest()
            if latest and not self._is_free(self._file(latest)):
                other = _read(self._file(latest)) or {}
                raise UserError(f"run.name: {self.run_folder} belongs to a run that goes on: {_describe(other)}; wait for it, "
                                "stop it, or choose another --run.name")
            own = self._folder / f"claim-{self._mine['token']}"
            write_whole(own, json.dumps(self._mine, indent=1))
            try:
                give_name(own, self._file(latest + 1))
            except FileExistsError:
                continue
            for number in self._numbers():
                if number <= latest:
                    self._file(number).unlink(missing_ok=True)
            return latest + 1

    def _is_free(self, file: Path) -> bool:
        """Whether the owner that left this file is dead. Waits where only time can tell."""
        other = _read(file)
        if other is None and file.exists():  # it may just be being written, where there are no hard links
            time.sleep(EMPTY_SECONDS)
            other = _read(file)
        if other is None:
            return True
        mine = self._mine
        restarts = int(mine["restart"]) - int(other["restart"]) if mine["job"] and other["job"] == mine["job"] else 0
        if other.get("released") and restarts >= 0:
            return True
        if all(other[key] == mine[key] for key in ("host", "boot", "pids")):
            # In a copy of a folder the file speaks of the run in the other one.
            return not _lives(other["pid"], other["started"]) or other["folder"] != mine["folder"]
        if restarts > 0:
            # Slurm has requeued the job. Where it only lost sight of a node, earlier processes live on there, and are fenced.
            return True
        return self._waits_in_vain(file, other)

    def _waits_in_vain(self, file: Path, other: dict[str, Any]) -> bool:
        """Whether nobody touches the file before it is stale."""
        try:
            seen = file.stat().st_mtime_ns
            said = False
            while (left := STALE_SECONDS - (self._server_time() - seen) / 1e9) > 0:
                if not said and left > 2 * BEAT_SECONDS:
                    self._say(f"{self.run_folder} was in use by {_describe(other)}; waiting up to {left:.0f} s to see whether "
                              "it still is")
                    said = True
                time.sleep(0.5)
                if file.stat().st_mtime_ns != seen:
                    return False
        except FileNotFoundError:  # somebody else has claimed the folder meanwhile
            return False
        return True

    def _server_time(self) -> int:
        """The file server's clock, in nanoseconds: our own may differ."""
        probe = self._folder / f"clock-{self._mine['token']}"
        probe.write_bytes(b"")
        os.utime(probe)
        now = probe.stat().st_mtime_ns
        probe.unlink()
        return now

    def _latest(self) -> int:
        return latest_claim(self.run_folder)

    def _numbers(self) -> list[int]:
        return _numbers_in(self._folder)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"


def latest_claim(run_folder: Path) -> int:
    """Number of the claim whose run has the folder, for the processes that hold no claim themselves; 0 where none is seen."""
    return max(_numbers_in(run_folder / ".owner"), default=0)


def who_has(run_folder: Path) -> str | None:
    """The run that has the folder, in words, or None where none has: for those who only look. By this machine's clock."""
    number = latest_claim(run_folder)
    file = run_folder / ".owner" / f"{number:08d}.json"
    other = _read(file) if number else None
    if other is None or other.get("released"):
        return None
    here = _this_process()
    if all(other[key] == here[key] for key in ("host", "boot", "pids")):
        return _describe(other) if _lives(other["pid"], other["started"]) else None
    with contextlib.suppress(FileNotFoundError):
        return _describe(other) if abs(time.time() - file.stat().st_mtime) < STALE_SECONDS else None
    return None


def _numbers_in(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if path.stem.isascii() and path.stem.isdecimal()]


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(),
            "boot": _line("/proc/sys/kernel/random/boot_id"), "pids": _link("/proc/self/ns/pid"),
            "job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}


def _line(path: str) -> str:
    """The one line of a file that other systems than Linux do not have."""
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _lives(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        # Reckoned from the boot time, which the clock's corrections move.
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(file: Path) -> dict[str, Any] | None:
    """None for a file that is gone, or that a full disk, a torn copy or another program has left without its content."""
    try:
        content = read_json(file)
        sound = isinstance(content, dict) and content.keys() >= _KEYS
        sound = sound and type(content["pid"]) is int and 0 < content["pid"] < 2**31
        sound = sound and isinstance(content["started"], (int, float)) and str(content["restart"]).isdecimal()
        return content if sound else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _describe(other: dict[str, Any]) -> str:
    job = f", Slurm job {other['job']}" if other.get("job") else ""
    return f"process {other.get('pid')} on {other.get('host')}{job}, since {other.get('since')}"
