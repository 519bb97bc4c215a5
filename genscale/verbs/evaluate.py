"""genscale evaluate RUN: the validation metrics of a trained run, on its own validation set or on any other, and the tasks of
lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from genscale.config import Config
from genscale.config_keys import as_key
from genscale.config_parser import parse_config, parse_settings, split_flags, take_number, take_text
from genscale.data.lanes import Sample
from genscale.errors import UserError
from genscale.evaluation.image_scores import TooFewImages
from genscale.evaluation.likelihood import check_likelihood, likelihood
from genscale.evaluation.scorers import SCORERS, Scorer
from genscale.evaluation.trained_run import TrainedRun
from genscale.evaluation.validation import validate
from genscale.objectives import FAMILIES
from genscale.parallel.precision import autocast, native_precision
from genscale.parallel.processes import on_cpu
from genscale.training.checkpoints import Checkpoint
from genscale.verbs.trained import Published, config_of, find_trained, open_run, take_run

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
BATCH_SIZE = 8
SHOWN_AFTER_SECONDS = 2.0


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        _help()
        return 0
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
        names = {field.name for field in dataclasses.fields(scorer.settings)}
        flags, rest = split_flags(rest, lambda name: name.replace("-", "_") in names)
        settings = parse_settings(scorer.settings, flags, IMAGE_USAGE.format(families=trained.model.family), IMAGE_DESCRIPTION)
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
        report |= _scores(config, checkpoint, scorer, settings)
    elif tasks is None:
        report |= _metrics(config, checkpoint)
    else:
        report |= _task_results(config, checkpoint, tasks.split(","), include_path, limit)
    print(json.dumps(report, indent=1))
    return 0


def _metrics(config: Config, checkpoint: Checkpoint | Published) -> dict[str, Any]:
    run = open_run(config, checkpoint)
    run.objective.use_assets(config, run.folder)
    return _validation(run, _samples(config))


def _samples(config: Config) -> list[Sample]:
    return FAMILIES[config.model.family].validation(config.data, config.run.seed)


def _validation(run: TrainedRun, samples: list[Sample]) -> dict[str, Any]:
    precision, objective = _precision(run.config), run.objective
    batch_size = run.config.train.micro_batch_size or BATCH_SIZE
    # Without a terminal nothing is shown, and nothing of what takes a moment only.
    with tqdm(total=len(samples), desc="samples", delay=SHOWN_AFTER_SECONDS, disable=None, file=sys.stderr) as bar:
        metrics = validate(objective, objective.networks, samples, batch_size=batch_size, rank=0, world_size=1,
                           device=run.device, reduce_sum=lambda total: total,
                           autocast=partial(autocast, precision, run.device), on_batch=bar.update)
    return {"samples": len(samples), "precision": precision, **metrics}


def _scores(config: Config, checkpoint: Checkpoint | Published, scorer: Scorer, settings: Any) -> dict[str, Any]:
    """Of generated images; of an autoencoder also the validation metrics, and the likelihood where it was asked for."""
    run = open_run(config, checkpoint, settings.live)
    if settings.importance_samples is not None:
        check_likelihood(run, settings.importance_samples)
    encodes = hasattr(run.objective, "encode")
    try:
        report = scorer.run(run, settings)
    except TooFewImages as error:
        if not encodes:
            raise
        print(f"warning: {error}; the scores of generated images are left out", file=sys.stderr)
        report = {}
    if encodes:
        samples = _samples(config)
        report["validation"] = _validation(run, samples)
        if settings.importance_samples is not None:  # the longest last: what is wrong has shown before
            report |= likelihood(run, samples, settings.importance_samples)
    return report


def _task_results(config: Config, checkpoint: Checkpoint | Published, tasks: list[str], include_path: str | None,
                  limit: int | None) -> dict[str, Any]:
    from genscale.evaluation.harness import GenscaleLM, evaluate_tasks, results_table

    run, precision = open_run(config, checkpoint), _precision(config)
    model = GenscaleLM(run.objective.networks["gpt"], run.objective.tokenizer,
                       autocast=partial(autocast, precision, run.device),
                       batch_size=config.train.micro_batch_size or BATCH_SIZE, seed=config.run.seed)
    results = evaluate_tasks(model, tasks, include_path, limit)
    print(results_table(results), file=sys.stderr)
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {"precision": precision, "limit": limit, **{key: results[key] for key in kept if key in results}}


def _precision(config: Config) -> str:
    # Weights are fp32; only the training's engines multiply in fp8, and do everything else in bf16.
    asked = "bf16" if config.train.precision == "fp8" else config.train.precision
    return native_precision(on_cpu()) if asked == "auto" else asked


def _help() -> None:
    with contextlib.suppress(SystemExit):  # which ends each help
        parse_config(FAMILIES, ["--help"], prog=USAGE, description=DESCRIPTION)
    families: dict[type, list[str]] = {}
    for family, scorer in SCORERS.items():
        families.setdefault(scorer.settings, []).append(family)
    for settings, names in families.items():
        print()
        with contextlib.suppress(SystemExit):
            parse_settings(settings, ["--help"], IMAGE_USAGE.format(families=", ".join(names)), IMAGE_DESCRIPTION)
