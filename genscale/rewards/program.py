"""A reward that a program of the site gives: JSON lines in and out, within limits, started again where it fails."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from genscale.errors import UserError
from genscale.rewards.asking import NoJudgement, insist, numbers
from genscale.rewards.base import Answer, TextReward
from genscale.rewards.site import Program, read_reward_site
from genscale.rewards.texts import column_of

LONGEST = 2**20
"""Bytes of a reply."""
BEAT_SECONDS = 1.0
"""A program that is waited for, within its time, counts as progress."""
# Limits are set by a small program that then becomes the other one: to run Python between fork and exec of a process with
# threads (torch's) may block for ever. The last lines of defence: what the program starts stays below it whatever becomes of
# its parents (36 is PR_SET_CHILD_SUBREAPER), and the program ends where genscale was killed (1, PR_SET_PDEATHSIG).
_LIMITED = """
import ctypes, os, resource, signal, sys
cpu, memory, parent = map(int, sys.argv[1:4])
for limit, value in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0),
                     (resource.RLIMIT_NOFILE, 256)):
    resource.setrlimit(limit, (value, value))
try:
    ctypes.CDLL(None).prctl(36, 1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != parent:
    sys.exit(1)
os.execv(sys.argv[4], sys.argv[4:])
"""


def asked_of(answer: Answer, columns: Sequence[str]) -> dict[str, Any]:
    """What a judge outside of genscale is told of an answer, as JSON has it."""
    return {"prompt": answer.prompt, "text": answer.text, "ended": answer.ended, "sample": answer.sample,
            "member": answer.member, "row": {column: column_of(answer, column) for column in columns}}


@dataclass(frozen=True)
class ProgramSettings:
    """Which of the site's programs judges."""

    program: str
    """Its name under rewards.programs in the site's file; a config names no file."""
    columns: list[str] = field(default_factory=list)
    """Columns of the prompt's row that it is told."""


class ProgramReward(TextReward):
    """What a program of the site says of an answer: it reads a JSON object a line and writes a number, or {"reward": a number}.

    Each process of the run has one, started with the first answer and kept; one that takes too long, ends or says something
    else is killed and asked again in a new one.
    """

    settings = ProgramSettings
    repeatable = False

    def __init__(self, asked: ProgramSettings) -> None:
        super().__init__(asked)
        self._program: Program = read_reward_site().program(asked.program)
        self._process: subprocess.Popen[bytes] | None = None
        self._said, self._complaint = b"", b""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the program is told."""
        return tuple(self.asked.columns)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """What it says. Raises UserError where it has failed three times for an answer."""
        found = []
        for number, answer in enumerate(answers):
            self.progress(f"answer {number + 1} of {len(answers)}")
            who = f"program {self.asked.program} for sample {answer.sample:,}, answer {answer.member}"
            found.append(insist(lambda answer=answer: self._ask(answer), who, self.close))  # type: ignore[misc]
        return found

    def close(self) -> None:
        """Kill it, and all that it has started: in its session, and below it in sessions of their own."""
        process, self._process = self._process, None
        if process is None:
            return
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for each in below:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _ask(self, answer: Answer) -> float:
        line = json.dumps(asked_of(answer, self.asked.columns), default=str).encode() + b"\n"
        said = self._exchange(self._running(), line, time.monotonic() + self._program.seconds)
        try:
            reply = json.loads(said)
            return numbers([reply["reward"] if isinstance(reply, dict) else reply], 1)[0]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise NoJudgement(f'said {said[:80]!r}, and neither a number nor {{"reward": a number}}') from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            program = self._program
            limits = [str(program.cpu_seconds), str(program.memory_mb * 2**20), str(os.getpid())]
            environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **program.environment}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _LIMITED, *limits, *program.command], stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=environment, start_new_session=True)
            except OSError as error:
                raise UserError(f"program: {self.asked.program} cannot be started ({error.strerror})") from None
            self._said = self._complaint = b""
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                os.set_blocking(stream.fileno(), False)  # type: ignore[union-attr]
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, deadline: float) -> bytes:
        """Its reply to a line. Raises NoJudgement where there is none in time."""
        assert process.stdin and process.stdout and process.stderr
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stderr, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while b"\n" not in self._said:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise NoJudgement(f"no reply in {self._program.seconds:g} seconds{self._last_words()}")
                ready = selector.select(min(left, BEAT_SECONDS))
                if not ready:
                    self.progress(f"{self._program.seconds - left:.0f} seconds")
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        line = self._write(process, line)
                        if not line:
                            selector.unregister(process.stdin)
                    elif not (piece := os.read(key.fd, 2**16)):
                        selector.unregister(key.fileobj)
                        if key.fileobj is process.stdout:
                            raise NoJudgement(f"it has ended{_how(process)}{self._last_words()}")
                    elif key.fileobj is process.stdout:
                        self._said += piece
                    else:
                        self._complaint = (self._complaint + piece)[-2000:]
                if len(self._said) > LONGEST:
                    raise NoJudgement(f"said more than {LONGEST:,} bytes without an end of line")
        said, _, self._said = self._said.partition(b"\n")
        if self._said or line:
            raise NoJudgement("said more than it was asked for; it must write one line for each that it reads")
        return said

    def _write(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin
        try:
            return line[os.write(process.stdin.fileno(), line):]
        except BrokenPipeError:
            raise NoJudgement(f"it has ended{_how(process)}{self._last_words()}") from None

    def _last_words(self) -> str:
        words = self._complaint.decode(errors="replace").strip().splitlines()
        return f": {words[-1][:200]}" if words else ""


def _how(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = process.wait(1)
        return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
    return ""
