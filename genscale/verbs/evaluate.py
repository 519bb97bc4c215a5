"""genscale evaluate RUN: the validation metrics of a trained run, on its own validation set or on any other, and the tasks of
lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from genscale.errors import UserError
from genscale.evaluation.settings import SCORING
from genscale.objectives import FAMILIES
from genscale.settings.keys import as_key
from genscale.settings.parser import parse_config, parse_settings, split_flags, take_number, take_text

USAGE = "genscale evaluate RUN [--step N] [--on SOURCE | --tasks A,B [--include_path DIR] [--limit N]]"
IMAGE_USAGE = "genscale evaluate RUN [--step N]  (model.family {families})"
DESCRIPTION = ("Validation metrics of a trained run, as one JSON object. RUN is a run folder (its latest "
               "checkpoint, or --step N's), a checkpoint folder or a Hugging Face folder. --on SOURCE: on the whole of another "
               "text (a file, a folder, a hub dataset's validation split) instead of the run's validation set. --tasks: on "
               "tasks of lm-evaluation-harness (pip install 'genscale[eval]'), or of a folder of task YAML files "
               "(--include_path); --limit: only so many documents of each. Every setting of the run can be "
               "overridden: --data.validation_blocks for how much of the text, --data.column, "
               "--train.precision, --train.micro_batch_size. Runs on images have flags of their own, below.")
IMAGE_DESCRIPTION = "Runs on images: scores of generated images with their protocol, and --on SOURCE as above."


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        _help()
        return 0
    from genscale.evaluation.scorers import SCORERS
    from genscale.verbs.scores import metrics, scores, task_results
    from genscale.verbs.trained import config_of, find_trained, take_run

    path, rest = take_run(arguments, USAGE)
    step, rest = take_number(rest, "--step", least=0)
    source, rest = take_text(rest, "--on")
    tasks, rest = take_text(rest, "--tasks")
    include_path, rest = take_text(rest, "--include_path")
    limit, rest = take_number(rest, "--limit", least=1)
    if tasks is None and (include_path is not None or limit is not None):
        raise UserError(f"{'--limit' if include_path is None else '--include_path'}: is about tasks; name them with --tasks")
    if tasks is not None and source is not None:
        raise UserError(f"--on: {source} cannot be joined with --tasks, which bring their own data; leave one out")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path: {include_path} is no folder; give one that holds task YAML files")
    trained, checkpoint = find_trained(path, step)
    if source is not None:  # all of it, unless the settings after it say how much
        if not hasattr(trained.data, "validation_source"):
            raise UserError(f"--on: {source}, but a run of model.family {trained.model.family} is judged by what it generates; "
                            "leave it out")
        amount = "validation_images" if hasattr(trained.data, "validation_images") else "validation_blocks"
        rest = ["--data.validation_source", source, f"--data.{amount}", str(sys.maxsize), *rest]
    scorer = SCORERS.get(trained.model.family)
    if scorer is not None:
        own = SCORING[trained.model.family]
        names = {field.name for field in dataclasses.fields(own)}
        flags, rest = split_flags(rest, lambda name: name.replace("-", "_") in names)
        settings = parse_settings(own, flags, IMAGE_USAGE.format(families=trained.model.family), IMAGE_DESCRIPTION)
    config = config_of(checkpoint, rest)
    if config.model != trained.model:
        key = next(field.name for field in dataclasses.fields(trained.model)
                   if getattr(config.model, field.name) != getattr(trained.model, field.name))
        raise UserError(f"model.{as_key(key)}: {getattr(config.model, key)} is not that of {checkpoint.path}, "
                        f"{getattr(trained.model, key)}; leave it out")
    report = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
    if scorer is not None:
        if tasks is not None:
            raise UserError(f"--tasks: {tasks}, but a run of model.family {config.model.family} writes no text; leave it out")
        report |= scores(config, checkpoint, scorer, settings)
    elif tasks is None:
        report |= metrics(config, checkpoint)
    else:
        report |= task_results(config, checkpoint, tasks.split(","), include_path, limit)
    print(json.dumps(report, indent=1))
    return 0


def _help() -> None:
    with contextlib.suppress(SystemExit):  # which ends each help
        parse_config(FAMILIES, ["--help"], prog=USAGE, description=DESCRIPTION)
    families: dict[type, list[str]] = {}
    for family, settings in SCORING.items():
        families.setdefault(settings, []).append(family)
    for settings, names in families.items():
        print()
        with contextlib.suppress(SystemExit):
            parse_settings(settings, ["--help"], IMAGE_USAGE.format(families=", ".join(names)), IMAGE_DESCRIPTION)
