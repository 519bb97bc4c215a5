"""Sees to it that a run that makes no progress ends, says where it hangs, and leaves no process behind.

A thread in each process writes `logs/heartbeat-<rank>.json` every few seconds: process, what it is doing, since when. The first
that has seen no progress for `guards.hang_minutes` has all processes write their stacks to `logs/stacks-rank-<rank>.txt`,
names the one that holds the others up, and ends the run with exit code 75. The same thread keeps the run folder ours, and ends
this process when another one has failed and it cannot notice by itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime
from mmap import mmap
from pathlib import Path
from typing import Any

import psutil

from genscale import exit_codes
from genscale.parallel.processes import BOARD, Processes
from genscale.printable import printable, say_at_once
from genscale.reading import read_json
from genscale.supervise.ending import Ending
from genscale.supervise.hang import Report, innermost, verdict
from genscale.supervise.run_owner import BEAT_SECONDS, Fenced, FolderGone, RunOwner
from genscale.writing import no_link, write_whole

log = logging.getLogger("genscale")
DUMP = signal.SIGUSR2
"""Makes a process write its stacks, whatever it is at, and also after it was stopped."""
GRACE_SECONDS = 5.0
"""For a process to end by itself after another one has failed."""
CLOSING_SECONDS = 25.0
"""For a process that has failed to close what it has open."""
GONE_BEATS = 4
"""So often in a row the run folder must be missing for the run to end: a file server may be away for a moment."""
VERDICT_SECONDS = 30.0
"""Longest wait for the process that says where the run hangs."""


class Watchdog:
    """The thread of one process; from `start` to `close`.

    Args:
        minutes: without progress (`Processes.note`, `note_write`) between `loop_begins` and `loop_ends`, after which the run
            ends (0: never).
        owner: of the run folder, on rank 0.
    """

    def __init__(self, run_folder: Path, processes: Processes, ending: Ending, minutes: float, owner: RunOwner | None) -> None:
        self.processes, self.ending, self.owner = processes, ending, owner
        self.limit = 60 * minutes
        self.poll = min(BEAT_SECONDS, max(0.25, self.limit / 8)) if minutes else BEAT_SECONDS
        self.logs = run_folder / "logs"
        self._alarm = self.logs / ".hang"
        self._stacks = open(self._file("stacks-rank", processes.rank, "txt"), "w", opener=no_link)  # noqa: SIM115 (open to the end)
        # A process that is stopped in the middle of a step cannot write its heartbeat any more.
        board = None
        if hasattr(os, "memfd_create"):  # Linux
            board = os.memfd_create("doing")
            os.ftruncate(board, BOARD)
            processes.board = mmap(board, BOARD)
            processes.note(processes.doing)
        self._identity: dict[str, Any] = {"rank": processes.rank, "host": socket.gethostname(), "pid": os.getpid(),
                          "started": psutil.Process().create_time(), "board": board,
                          "main_thread": f"0x{threading.main_thread().ident:016x}"}
        self._seen, self._since, self._since_when = self._progress(), time.monotonic(), datetime.now(UTC)
        self._left: float | None = None  # when the end of the run was first seen
        self._in_loop = False
        self._missed = 0  # looks in a row that have not found the run folder
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    @staticmethod
    def clear(run_folder: Path) -> None:
        """Remove what an earlier run has left; on rank 0, before any process starts its watchdog."""
        for pattern in (".hang", "heartbeat-*", ".heartbeat-*", "stacks-rank-*.txt"):
            for path in (run_folder / "logs").glob(pattern):
                path.unlink(missing_ok=True)

    def start(self) -> None:
        faulthandler.register(DUMP, file=self._stacks, all_threads=True)
        with contextlib.suppress(OSError):  # a full disk
            self._beat()  # at once: the process may be stopped before the thread's first
        self._thread.start()

    def loop_begins(self) -> None:
        self._since, self._in_loop = time.monotonic(), True

    def loop_ends(self) -> None:
        self._in_loop = False

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=10)
        if self.processes.board is not None:
            self.processes.board = None
            os.close(self._identity["board"])
        faulthandler.unregister(DUMP)
        self._stacks.close()
        with contextlib.suppress(OSError):
            self._file("heartbeat", self.processes.rank, "json").unlink(missing_ok=True)
            if not os.path.getsize(self._stacks.name):
                os.unlink(self._stacks.name)

    def _file(self, kind: str, rank: int, suffix: str) -> Path:
        return self.logs / f"{kind}-{rank:05d}.{suffix}"

    def _progress(self) -> tuple[int, int]:
        return self.processes.beats, self.processes.writes

    def _run(self) -> None:
        # All that follows from a look is counted up to its beginning: the process may be suspended in the middle of one, and
        # only the next knows for how long.
        looked = time.monotonic()
        while not self._closed.wait(self.poll):
            asleep, looked = time.monotonic() - looked - self.poll, time.monotonic()
            if asleep > self.poll:  # the whole process was: a suspended job, a laptop's lid
                self._since += asleep
            if (progress := self._progress()) != self._seen:
                self._seen, self._since, self._since_when = progress, looked, datetime.now(UTC)
            if not self._keep_the_folder():
                continue
            with contextlib.suppress(OSError):  # a full disk
                self._beat()
            self._leave_with_the_others(looked)
            late = self.limit and looked - self._since > self.limit
            if self._in_loop and (late or os.path.exists(self._alarm)):  # Path.exists raises where a server is out of reach
                self._hang()

    def _keep_the_folder(self) -> bool:
        """Keep the run folder ours. Another run that has it would take this one's heartbeats and alarm for its own.

        Returns: whether it is there, as far as can be told."""
        try:
            if self.owner is not None:
                self.owner.beat()
            elif self.ending.taken_over():
                os._exit(exit_codes.USER_ERROR)  # rank 0 says why
            if self._missed:
                log.warning("%s is there again; the run goes on", self.logs.parent)
            self._missed = 0
        except Fenced as fenced:
            self._exit(exit_codes.USER_ERROR, str(fenced))
        except FolderGone as gone:
            self._folder_is_gone(gone)
            return False
        except OSError:
            pass  # nothing can be told now
        return True

    def _folder_is_gone(self, gone: FolderGone) -> None:
        self._missed += 1
        if self._missed == 1:
            seconds = (GONE_BEATS - 1) * self.poll
            log.warning("%s; the run stops in %.0f seconds if it is not there again", gone.strerror, seconds)
        if self._missed < GONE_BEATS:
            return
        again = "put it back"
        if gone.now:
            again += f", or add --run.dir {shlex.quote(str(gone.now.parent))} --run.name {shlex.quote(gone.now.name)},"
        line = f"run.dir: {gone.strerror}; to go on from its latest checkpoint, {again} and start the run again"
        if gone.now:  # the end is told to whoever finds it
            self.logs = gone.now / "logs"
            self.ending.moved(gone.now)
            self.ending.claim("failed", exit_codes.USER_ERROR, reason=line)
        if self.owner is not None:  # who puts it back is not to wait until it looks dead
            self.owner.release()
        self._exit(exit_codes.USER_ERROR, line)

    def _beat(self) -> None:
        heartbeat = {**self._identity, "doing": self.processes.doing, "beats": self._seen[0],
                     "since": self._since_when.isoformat(timespec="seconds")}
        # A process that is stopped in the middle leaves the former one.
        write_whole(self._file("heartbeat", self.processes.rank, "json"), json.dumps(heartbeat))

    def _leave_with_the_others(self, looked: float) -> None:
        """A process that waits for one that has failed may wait for long: in a library, or for a device."""
        said = self.ending.said()
        if said is None or said["how"] not in ("failed", "lost", "hang"):
            return
        self._left = self._left or looked
        idle = looked - max(self._left, self._since)  # a checkpoint may still be on its way to the disk
        if self.ending.is_ours() and idle > CLOSING_SECONDS:
            self._exit(said["exit_code"], said["reason"])
        elif not self.ending.is_ours() and idle > GRACE_SECONDS:
            os._exit(said["exit_code"])

    def _hang(self) -> None:
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        try:
            os.close(os.open(self._alarm, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            self._wait_for_the_verdict()
        except OSError:
            pass  # on a full disk every process judges for itself
        self._judge()

    def _wait_for_the_verdict(self) -> None:
        deadline = time.monotonic() + VERDICT_SECONDS
        while self.ending.said() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        os._exit(exit_codes.HANG)

    def _judge(self) -> None:
        """Name the process that holds the others up, and end the run."""
        mine = self._file("heartbeat", self.processes.rank, "json")
        now = mine.stat().st_mtime if mine.exists() else time.time()
        others = [rank for rank in range(self.processes.world_size) if rank != self.processes.rank]
        silent = [rank for rank in others if self._is_silent(rank, now)]
        self._wait_for_stacks([rank for rank in others if rank not in silent], 2 * self.poll + 3)
        here = {rank: pid for rank in silent if (pid := self._pid_here(rank))}
        doing = {rank: _board(pid, self._heartbeat(rank)["board"]) for rank, pid in here.items()}
        for pid in here.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, DUMP)
                os.kill(pid, signal.SIGCONT)  # a stopped process answers first of all when it goes on
        if here:
            self._wait_for_stacks(silent, 3)
        reports = [self._report(rank, rank in silent, doing.get(rank)) for rank in range(self.processes.world_size)]
        seconds = f"{self.limit / 60:g} minutes" if self.limit >= 60 else f"{self.limit:g} seconds"
        line = (f"no progress for {seconds} (guards.hang_minutes): {verdict(reports)}; the stacks of all processes are in "
                f"{self.logs}/stacks-rank-*.txt; start the run again, and it goes on from its latest checkpoint")
        self.ending.claim("hang", exit_codes.HANG, reason=line)
        others_here = [pid for pid in map(self._pid_here, others) if pid]
        if others_here:  # they end by themselves where they can
            words = " ".join(map(str, others_here))
            subprocess.Popen(["/bin/sh", "-c", f"sleep 2; kill -9 {words} 2>/dev/null"], start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._exit(exit_codes.HANG, line)

    def _is_silent(self, rank: int, now: float) -> bool:
        """Whether its heartbeat stopped when its progress did: the process is stopped, or its machine gone."""
        try:
            return now - self._file("heartbeat", rank, "json").stat().st_mtime > self.limit / 2
        except OSError:
            return True

    def _wait_for_stacks(self, ranks: list[int], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(self._stack(rank) for rank in ranks):
            time.sleep(0.1)

    def _stack(self, rank: int) -> str:
        with contextlib.suppress(OSError):
            return self._file("stacks-rank", rank, "txt").read_text()
        return ""

    def _heartbeat(self, rank: int) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return read_json(self._file("heartbeat", rank, "json"))
        return {}

    def _pid_here(self, rank: int) -> int | None:
        """The number of the rank's process, where it is one of this machine and still is the one that wrote the heartbeat."""
        beat = self._heartbeat(rank)
        if beat.get("host") == self._identity["host"]:
            with contextlib.suppress(psutil.Error):
                if psutil.Process(beat["pid"]).create_time() == beat["started"]:
                    return beat["pid"]
        return None

    def _report(self, rank: int, silent: bool, doing: str | None) -> Report:
        beat = self._heartbeat(rank)
        doing = doing or beat.get("doing", "an unknown place")
        return Report(rank, beat.get("host", "?"), beat.get("pid", 0), doing, beat.get("beats", 0), silent,
                      innermost(self._stack(rank), beat.get("main_thread", "")))

    def _exit(self, code: int, line: str) -> None:
        """Not through the console's or the log's own locks, which a thread that hangs may hold."""
        line = printable(line)
        say_at_once(f"error: {line}")
        with contextlib.suppress(OSError), open(self._file("rank", self.processes.rank, "log"), "a", opener=no_link) as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} ERROR genscale: {line}\n")
        os._exit(code)


def _board(pid: int, descriptor: int | None) -> str:
    """What another process of this machine is doing, whatever state it is in."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/fd/{descriptor}").read_bytes().decode(errors="replace").strip()
    return ""
