"""A group of processes out of one import: `python -m genscale.testing.group PROCESSES SCRIPT WORDS...`, or `-m genscale` in the
place of a script.

A launcher imports torch for itself and each process again, which takes longer than a toy's whole training. Here the processes
are forked when all is imported; apart from that each finds what torchrun would have given it, and one alone what a shell would.
`genscale.testing.forks` has such groups, one after the other, out of a single import.
"""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
from pathlib import Path


def main(count: int, words: list[str]) -> int:
    """Run a script, or a module after `-m`, in `count` processes, and end with the first code of them that is not 0; the others
    are then ended."""
    load(words)
    if count == 1:
        _run(words)
        return 0
    pipes = [os.pipe() for _ in range(count)]
    children = {}
    for rank, (read, _) in enumerate(pipes):
        sys.stdout.flush()
        if not (pid := os.fork()):
            _be(rank, count, int(os.read(read, 16)))
            _run(words)
            sys.exit(0)
        children[pid] = rank
    # Made after the forks, for it has a thread; the port is any free one, and held from the start.
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, write in pipes:
        os.write(write, str(store.port).encode())
    while children:
        pid, status = os.wait()
        children.pop(pid)
        if code := os.waitstatus_to_exitcode(status):
            for other in children:
                os.kill(other, signal.SIGKILL)
            return code if code > 0 else 128 - code
    return 0


def load(words: list[str]) -> None:
    """Import what the processes of a group do, for those that are forked from this one."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    import genscale.testing.runs
    import genscale.testing.training  # noqa: F401
    from genscale.parallel.processes import load_ahead

    load_ahead(any("zero" in word for word in words))
    gc.freeze()  # DeepSpeed collects garbage for each engine of ZeRO-3: half a second where all modules are looked through


def _be(rank: int, count: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                   "TORCHELASTIC_RUN_ID": "testing", "TORCHELASTIC_RESTART_COUNT": "0"}


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        script = Path(words[0]).resolve()
        sys.argv, sys.path[0] = [str(script), *words[1:]], str(script.parent)
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
