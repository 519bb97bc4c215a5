"""A writer killed by SIGKILL at any moment leaves only whole checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# Torch is imported once; each writer is a fork that writes, replaces and prunes until it is killed.
WRITERS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from genscale.training.checkpoints import list_checkpoints, prune, write_checkpoint

folder, trials = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
values = {f"tensor.{i}": torch.full((300, 300), float(i)) for i in range(6)}
moments = random.Random(0)
for trial in range(trials):
    done = max([checkpoint.step for checkpoint in list_checkpoints(folder)], default=0)
    reading, writing = os.pipe()
    writer = os.fork()
    if not writer:
        try:
            for step in range(done + 1, done + 10**6):
                for _ in range(2):  # the second replaces the first, as a resumed run does
                    write_checkpoint(folder, step, {"networks/gpt": values, "optimizers/gpt": values}, {"step": step}, "")
                prune(folder, 2, best_step=1)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.read(reading, 1)
    time.sleep(moments.uniform(0, 0.04))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    os.close(reading), os.close(writing)
    print(json.dumps({"before": done, "killed": os.WTERMSIG(status) == signal.SIGKILL,
                      "partial": [path.name for path in folder.glob(".partial-*")],
                      "found": [[checkpoint.step, checkpoint.problem()] for checkpoint in list_checkpoints(folder)]}))
"""


def test_a_killed_writer_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WRITERS, str(tmp_path), "25"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == 25 and all(trial["killed"] for trial in trials)
    for trial in trials:
        steps = [step for step, _ in trial["found"]]
        assert not [problem for _, problem in trial["found"] if problem], trial
        assert steps[0] == 1, "the best was pruned"
        assert steps[-1] > trial["before"], "a finished checkpoint was lost"
    # The kills came in the middle of the work, not between.
    assert sum(bool(trial["partial"]) for trial in trials) > 5
