"""genscale evaluate RUN: the validation metrics of a trained run, on its own validation set or on any other."""

from __future__ import annotations

import json

from genscale.config_parser import load_config, parse_config, take_number
from genscale.errors import UserError
from genscale.evaluation.validation import validate
from genscale.objectives import FAMILIES
from genscale.parallel.precision import autocast
from genscale.verbs.trained import find_trained, load_weights, run_of, take_run

USAGE = "genscale evaluate RUN [--step N]"
DESCRIPTION = ("Validation metrics of a trained run, as one JSON object. RUN is a run folder (its latest "
               "checkpoint, or --step N's) or a "
               "checkpoint folder. Every setting of the run can be overridden: --data.validation_source for another text, "
               "--data.validation_blocks for how much of it, --train.precision, --train.micro_batch_size.")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        parse_config(FAMILIES, ["--help"], prog=USAGE, description=DESCRIPTION)
        return 0
    path, rest = take_run(arguments, USAGE)
    step, rest = take_number(rest, "--step", least=0)
    trained, checkpoint = find_trained(path, step)
    config = load_config(FAMILIES, checkpoint.path / "config.yaml", rest)
    if config.model != trained.model:
        raise UserError(f"model: {config.model} is not the model of {checkpoint.path}, {trained.model}; leave model.* out")
    family = FAMILIES[config.model.family]
    objective = family.restore(config, run_of(checkpoint))
    objective.use_assets(config, run_of(checkpoint))
    data = family.build_data(config.data, config.run.seed)
    device = load_weights(objective, checkpoint)
    samples = data.validation()
    batch_size = config.train.micro_batch_size or 8
    metrics = validate(objective, objective.networks, samples, batch_size=batch_size, rank=0, world_size=1, device=device,
                       reduce_sum=lambda total: total, autocast=lambda: autocast(config.train.precision, device))
    print(json.dumps({"checkpoint": str(checkpoint.path), "step": checkpoint.step, "samples": len(samples),
                      "precision": config.train.precision, **metrics}, indent=1))
    return 0
