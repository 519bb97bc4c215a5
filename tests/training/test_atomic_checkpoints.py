"""A writer killed by SIGKILL leaves only whole checkpoints: at random moments, and before each change to the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

# Torch is imported once; each writer is a fork that writes, replaces and prunes until it is killed.
WRITERS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from genscale.checkpoint.writing import write_checkpoint
from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.checkpoint.retention import prune

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
    os.close(writing)  # or a writer that fails would leave the next line waiting
    finished = os.read(reading, 1)
    time.sleep(moments.uniform(0, 0.04))
    os.kill(writer, signal.SIGKILL)
    _, status = os.waitpid(writer, 0)
    finished += os.read(reading, 10**6)
    os.close(reading)
    print(json.dumps({"finished": done + len(finished), "killed": os.WTERMSIG(status) == signal.SIGKILL,
                      "partial": [path.name for path in folder.glob(".partial-*")],
                      "found": [[checkpoint.step, checkpoint.problem()] for checkpoint in list_checkpoints(folder)]}))
"""


def test_a_killed_writer_leaves_only_whole_checkpoints(tmp_path: Path, python_process: Callable[..., str]) -> None:
    trials = [json.loads(line) for line in python_process(WRITERS, tmp_path, 25).splitlines()]
    assert len(trials) == 25 and all(trial["killed"] for trial in trials)
    for trial in trials:
        steps = [step for step, _ in trial["found"]]
        assert not [problem for _, problem in trial["found"] if problem], trial
        assert steps[0] == 1, "the best was pruned"
        assert steps[-1] >= trial["finished"], "a finished checkpoint was lost"
    # The kills came in the middle of the work, not between.
    assert sum(bool(trial["partial"]) for trial in trials) > 5


# The same, but the writer kills itself right before its k-th change to the folder, for every k there is.
CHANGES = """
import json, os, shutil, signal, sys
from pathlib import Path
import torch
from genscale.checkpoint.writing import write_checkpoint
from genscale.checkpoint.checkpoints import list_checkpoints
from genscale.checkpoint.retention import prune

folder, kinds = Path(sys.argv[1]), {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
torch.set_num_threads(1)
values = {"networks/gpt": {"w": torch.ones(3)}, "optimizers/gpt": {"w": torch.ones(3)}}

def write(step):
    write_checkpoint(folder, step, values, {"step": step}, "")

for moment in range(1, 1000):
    shutil.rmtree(folder, ignore_errors=True)
    write(1), write(2)
    writer = os.fork()
    if not writer:
        left = [moment]
        def count(event, arguments):
            if event in kinds:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        write(2), write(3)
        prune(folder, 2, best_step=None)
        left[0] = -1
        os._exit(0)
    _, status = os.waitpid(writer, 0)
    print(json.dumps([[checkpoint.step, checkpoint.problem()] for checkpoint in list_checkpoints(folder)]))
    if status == 0:
        break
"""


def test_a_kill_before_each_change_to_the_disk(tmp_path: Path, python_process: Callable[..., str]) -> None:
    states = [json.loads(line) for line in python_process(CHANGES, tmp_path / "checkpoints").splitlines()]
    assert len(states) > 40, "too few moments: the changes were not seen"
    for found in states:
        assert not [problem for _, problem in found if problem], found
        steps = [step for step, _ in found]
        # While one is replaced by another of its step, for an instant there is neither.
        assert steps in ([1, 2], [1], [1, 2, 3], [2, 3]), steps
    assert [step for step, _ in states[-1]] == [2, 3] and states.count([[1, None]]) <= 1
