"""What `genscale evaluate` reports of a trained run: its validation metrics, scores of generated images, and tasks."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, cast

from tqdm import tqdm

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.frozen_networks import check_judges
from genscale.checkpoint.provenance import check_sources
from genscale.data.lanes import Sample
from genscale.errors import UserError
from genscale.evaluation.image_scores import TooFewImages
from genscale.evaluation.likelihood import likelihood
from genscale.evaluation.trained_run import TrainedRun
from genscale.evaluation.validation import validate
from genscale.families import family
from genscale.families.entry import Scoring
from genscale.objectives.capabilities import MeasuresLikelihood, WritesText
from genscale.parallel.precision import autocast, native_precision
from genscale.parallel.processes import on_cpu
from genscale.settings.config import Config, TrainSettings, micro_batch_of
from genscale.supervise.run_folder import config_dict
from genscale.verbs.trained import Published, open_run

BATCH_SIZE = 8
SHOWN_AFTER_SECONDS = 2.0


def metrics(config: Config, checkpoint: Checkpoint | Published) -> dict[str, Any]:
    check_sources(config, [checkpoint.path])
    run = open_run(config, checkpoint)
    _check_judges(run, checkpoint)
    return _validation(run, _samples(run.objective.use_assets(config, run.folder)))


def _check_judges(run: TrainedRun, checkpoint: Checkpoint | Published) -> None:
    """Raises UserError where the run's own rewards ask another network than they did; what is asked for here may be another."""
    rewards = run.objective.rewards
    if rewards is not None and isinstance(checkpoint, Checkpoint) and \
            config_dict(run.config).get("objective") == checkpoint.config().get("objective"):
        check_judges(rewards.identities(), checkpoint)


def _samples(config: Config) -> list[Sample]:
    return family(config.model.family).validation(config.data, config.run.seed)


def _validation(run: TrainedRun, samples: list[Sample]) -> dict[str, Any]:
    precision, objective = _precision(run.config.train), run.objective
    batch_size = micro_batch_of(run.config.train) or BATCH_SIZE
    # Without a terminal nothing is shown, and nothing of what takes a moment only.
    with tqdm(total=len(samples), desc="samples", delay=SHOWN_AFTER_SECONDS, disable=None, file=sys.stderr) as bar:
        metrics = validate(objective, objective.networks, samples, batch_size=batch_size, rank=0, world_size=1,
                           device=run.device, reduce_sum=lambda total: total,
                           autocast=partial(autocast, precision, run.device), on_batch=bar.update)
    assert metrics is not None  # nobody cuts it short
    return {"samples": len(samples), "precision": precision, **metrics}


def scores(config: Config, checkpoint: Checkpoint | Published, scoring: Scoring, settings: Any) -> dict[str, Any]:
    """What the family's scorer finds, the validation metrics where it says so, and the likelihood where it was asked for."""
    check_sources(config, [checkpoint.path])
    importance_samples = getattr(settings, "importance_samples", None)
    if importance_samples is not None and not family(config.model.family).can(MeasuresLikelihood):
        raise UserError(f"--importance_samples: {importance_samples}, but a run of model.family {config.model.family} has no "
                        "likelihood; leave it out")
    run = open_run(config, checkpoint, getattr(settings, "live", False))
    try:
        report = scoring.load()(run, settings)
    except TooFewImages as error:
        if not scoring.with_validation:
            raise
        print(f"warning: {error}; the scores of generated images are left out", file=sys.stderr)
        report = {}
    if scoring.with_validation:
        samples = _samples(config)
        report["validation"] = _validation(run, samples)
        if importance_samples is not None:  # the longest last: what is wrong has shown before
            report |= likelihood(run, samples, importance_samples)
    return report


def task_results(config: Config, checkpoint: Checkpoint | Published, tasks: list[str], include_path: str | None,
                  limit: int | None) -> dict[str, Any]:
    from genscale.families.gpt.harness import GenscaleLM, evaluate_tasks, results_table
    from genscale.families.gpt.network import GPT

    run, precision = open_run(config, checkpoint), _precision(config.train)
    objective = cast(WritesText, run.objective)
    model = GenscaleLM(cast(GPT, run.networks[objective.writes]), objective.tokenizer,
                       autocast=partial(autocast, precision, run.device),
                       batch_size=micro_batch_of(config.train) or BATCH_SIZE, seed=config.run.seed)
    results = evaluate_tasks(model, tasks, include_path, limit)
    print(results_table(results), file=sys.stderr)
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {"precision": precision, "limit": limit, **{key: results[key] for key in kept if key in results}}


def _precision(settings: TrainSettings) -> str:
    # Weights are fp32; only the training's engines multiply in fp8, and do everything else in bf16.
    asked = "bf16" if settings.precision == "fp8" else settings.precision
    return native_precision(on_cpu()) if asked == "auto" else asked
