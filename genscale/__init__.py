"""genscale trains generative models at any scale: a run is the same run however it is sharded, interrupted or resized."""

import importlib
from typing import Any

from genscale.process_settings import keep_memory, wait_longer_if_quiet, wait_shortly

__version__ = "0.2.0"

# Here, which runs before anything else of genscale, and before torch.
wait_shortly()
keep_memory()

_HOMES = {"config": "genscale.api", "train": "genscale.api", "load": "genscale.api", "Config": "genscale.settings.config",
          "Hook": "genscale.hook", "every": "genscale.hook",
          "Order": "genscale.hook",
          "StepReport": "genscale.hook", "RunResult": "genscale.training.run",
          "Family": "genscale.families.entry", "Sampling": "genscale.families.entry", "Scoring": "genscale.families.entry",
          "Objective": "genscale.objectives.base", "Phase": "genscale.objectives.base", "Data": "genscale.data.lanes",
          "Answer": "genscale.rewards.base", "TextReward": "genscale.rewards.base", "ImageReward": "genscale.rewards.base",
          "MovingState": "genscale.models.moving_state",
          "MapData": "genscale.data.map_data", "ShardData": "genscale.data.shard_data",
          "LoaderSettings": "genscale.data.loader_settings", "SimpleObjective": "genscale.families.own",
          "make_family": "genscale.families.own", "register": "genscale.families", "start": "genscale.cli",
          "TrainedRun": "genscale.evaluation.trained_run", "UserError": "genscale.errors"}
"""The public names and where they are, for `__getattr__`: who imports genscale need not wait for torch. Type checkers read the
same in `__init__.pyi`."""
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'genscale' has no attribute '{name}'")
    if name == "train":
        wait_longer_if_quiet()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
