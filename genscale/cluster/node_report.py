"""What one node tells the batch script, as a process of its own: `python -m genscale.cluster.node_report`, started by srun.

Prints lines of JSON: the clock of the node at once; what it found, a line a check (short ones: nodes share a pipe); and last
whether it sees what the batch script wrote.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from genscale.cluster.checks import host_name
from genscale.cluster.doctor import node_check
from genscale.cluster.node_checks import Load
from genscale.cluster.shared_folder import find_token


def main(run_folder: str, meeting: str, token: str, seconds: str, workers: str) -> None:
    """The arguments of the command, in order: the batch script has left its token in the folder `meeting`, and waits for
    `seconds` until it is found."""
    host = host_name()
    _say(host=host, clock=time.time())
    sees = find_token(Path(meeting), token, host, float(seconds))
    for check in node_check(Path(run_folder), Load.of_environment(int(workers))):
        _say(host=host, check=check.as_dict())
    _say(host=host, sees=sees)


def _say(**words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")  # print() writes twice where nothing is buffered
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
