"""genscale sample RUN: from any checkpoint of any strategy, in one process."""

from __future__ import annotations

import contextlib
import sys

from genscale.errors import UserError
from genscale.evaluation.settings import SAMPLING
from genscale.settings.parser import parse_settings, split_flags, take_number

USAGE = "genscale sample RUN [--step N]"
DESCRIPTION = ("Generate from a trained run. RUN is a run folder (its latest checkpoint, or --step N's), a checkpoint folder "
               "or a Hugging Face folder. The settings of a run's data can be overridden.")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        _help()
        return 0
    from genscale.evaluation.samplers import SAMPLERS
    from genscale.verbs.trained import config_of, find_trained, open_run, take_run

    path, rest = take_run(arguments, USAGE)
    step, rest = take_number(rest, "--step", least=0)
    config, checkpoint = find_trained(path, step)
    if config.model.family not in SAMPLERS:
        raise UserError(f"model.family: {path} is a run of {config.model.family}, which makes nothing to write; samples can be "
                        f"had of {', '.join(SAMPLERS)}")
    overrides, rest = split_flags(rest, lambda name: name.startswith("data."))
    settings = parse_settings(SAMPLING[config.model.family], rest, USAGE, DESCRIPTION)
    if overrides:
        config = config_of(checkpoint, overrides)
    run = open_run(config, checkpoint, live=getattr(settings, "live", False))
    print(f"{checkpoint.path}", file=sys.stderr)
    SAMPLERS[config.model.family](run, settings)
    return 0


def _help() -> None:
    families: dict[type, list[str]] = {}
    for family, settings in SAMPLING.items():
        families.setdefault(settings, []).append(family)
    for settings, names in families.items():
        with contextlib.suppress(SystemExit):  # which ends each help
            parse_settings(settings, ["--help"], f"{USAGE}  (model.family {', '.join(names)})", DESCRIPTION)
        print()
