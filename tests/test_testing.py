"""genscale.testing: what is started ends, and who fails or stays behind is told."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from genscale.testing import processes
from genscale.testing.processes import group, run, start

PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', '{child}']); time.sleep(1)"


def test_a_child_that_stays_behind_is_named_and_ended(monkeypatch):
    command = (sys.executable, "-c")
    done = run(PARENT.format(child="pass"), command=command)
    assert done.code == 0 and not done.left_behind
    monkeypatch.setattr(processes, "LINGER", 0.3)
    assert run(PARENT.format(child="import time; time.sleep(100)"), command=command).left_behind


def test_who_takes_too_long_is_ended():
    done = run("import time; time.sleep(100)", command=(sys.executable, "-c"), timeout=1)
    assert (done.code, done.error, done.left_behind) == (None, "hung", ())


def test_a_group_ends_with_the_first_that_fails(tmp_path, genscale_process):
    (tmp_path / "script.py").write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(100)\n")
    done = genscale_process(2, tmp_path / "script.py", command=(sys.executable, "-m", "genscale.testing.group"))
    assert done.code == 3, done.err


LOOK = """
import json, os, sys, time
print(json.dumps(["torch" in sys.modules, os.getsid(0) == os.getpid(), os.getcwd(), sys.argv, sys.path[:2],
                  os.environ.get("GENSCALE_SEEN"), sys.stdin.read(), "RANK" in os.environ]))
print("to errors", file=sys.stderr)
sys.exit(len(sys.argv))
"""


@pytest.fixture
def look(tmp_path: Path) -> Path:
    (tmp_path / "look.py").write_text(LOOK)
    return tmp_path / "look.py"


def test_what_is_forked_finds_what_a_process_of_its_own_does(look: Path):
    there = look.parent / "elsewhere"
    there.mkdir()
    variables = {"GENSCALE_SEEN": "yes", "PYTHONPATH": "/nowhere"}
    seen = []
    for command in [(sys.executable,), group(1)]:
        done = run(look, "a", "b", command=command, environment=variables, folder=there)
        assert (done.code, done.err) == (3, "to errors\n")
        seen.append(json.loads(done.out))
    assert seen[0] == [False, True, str(there), [str(look), "a", "b"], [str(look.parent), "/nowhere"], "yes", "", False]
    assert seen[1] == [True, *seen[0][1:]], "and torch is there already"


def test_what_its_imports_would_read_is_no_variable_of_a_forked_process(look: Path):
    done = run(look, command=group(1), environment={"OMP_NUM_THREADS": "3"})
    assert done.code == 1 and not json.loads(done.out)[0], "a process of its own, in which nothing was imported"


def test_a_forked_process_is_killed_as_any_other(tmp_path: Path):
    (tmp_path / "child.py").write_text("import os, time\nif os.fork(): print('parent', flush=True)\ntime.sleep(100)\n")
    running = start(tmp_path / "child.py", command=group(1))
    assert running.poll() is None and running.process.returncode is None
    while "parent" not in running.printed():
        assert running.poll() is None
    running.kill()
    assert running.finish().code == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)
