"""A process that leaves without the interpreter's teardown ends with the same exit code, words and last deeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The thread that is not done, what is registered and the unflushed line come before the end; the module is not cleared.
SCRIPT = """
import atexit, sys, threading, time
from genscale.parallel.exit_together import run_and_leave

class Global:
    def __del__(self):
        print("torn down")

kept = Global()
atexit.register(lambda: print("registered"))

def work():
    time.sleep(0.3)
    print("thread")

def run():
    threading.Thread(target=work).start()
    ENDING

LEAVE
"""


@pytest.mark.parametrize(("ending", "code", "said"), [
    ("return 138", 138, ""), ("return None", 0, ""), ("sys.exit(75)", 75, ""), ("sys.exit()", 0, ""), ("return -1", 255, ""),
    ("sys.exit('in words')", 1, "in words\n"), ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug\n"),
])  # fmt: skip
def test_it_ends_as_the_interpreter_would(ending: str, code: int, said: str) -> None:
    ends = {}
    for leave in ("run_and_leave(run)", "sys.exit(run())"):
        script = SCRIPT.replace("ENDING", ending).replace("LEAVE", leave)
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=60)
        ends[leave] = done
        assert done.returncode == code, done.stderr
        assert done.stderr.endswith(said) and ("Traceback" in done.stderr) == ending.startswith("raise")
    left, torn_down = (done.stdout.splitlines() for done in ends.values())
    assert left == ["thread", "registered"] and torn_down == [*left, "torn down"]
