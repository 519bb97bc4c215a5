"""genscale.testing: what is started ends, and who fails or stays behind is told."""

from __future__ import annotations

import sys

from genscale.testing import processes
from genscale.testing.processes import run

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
