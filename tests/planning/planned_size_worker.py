"""A run that asks the planner with the profile of a CPU of so little memory, which is none of the GPUs that it is for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from genscale.families import FAMILIES
from genscale.parallel.exit_together import run_and_leave
from genscale.planning.profiles import profile
from genscale.planning.starting import with_planned_size
from genscale.settings.parser import load_config
from genscale.training.run import train

if __name__ == "__main__":
    file, memory, *flags = sys.argv[1:]
    cpu = replace(profile("cpu"), memory_bytes=int(memory))
    run_and_leave(lambda: train(with_planned_size(load_config(FAMILIES, Path(file), flags), cpu)) and 0)
