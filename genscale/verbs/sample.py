"""genscale sample RUN: from any checkpoint of any strategy, in one process."""

from __future__ import annotations

import sys

from genscale.config_parser import parse_settings, take_number
from genscale.evaluation.samplers import SAMPLERS
from genscale.objectives import FAMILIES
from genscale.verbs.trained import find_trained, load_weights, run_of, take_run

USAGE = "genscale sample RUN [--step N]"
DESCRIPTION = ("Generate from a trained run. RUN is a run folder (its latest checkpoint, or --step N's), a checkpoint folder "
               "or a Hugging Face folder.")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        for sampler in SAMPLERS.values():
            parse_settings(sampler.settings, ["--help"], USAGE, DESCRIPTION)
        return 0
    path, rest = take_run(arguments, USAGE)
    step, rest = take_number(rest, "--step", least=0)
    config, checkpoint = find_trained(path, step)
    sampler = SAMPLERS[config.model.family]
    settings = parse_settings(sampler.settings, rest, USAGE, DESCRIPTION)
    objective = FAMILIES[config.model.family].restore(config, run_of(checkpoint))
    load_weights(objective, checkpoint)
    print(f"{checkpoint.path}", file=sys.stderr)
    sampler.run(objective, settings)
    return 0
