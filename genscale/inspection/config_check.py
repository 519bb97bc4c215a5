"""What can be found wrong with a run before it has the machines to run on."""

from __future__ import annotations

from dataclasses import replace

from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.frozen_networks import check_judges
from genscale.checkpoint.provenance import check_sources
from genscale.errors import UserError
from genscale.families import family
from genscale.interop.starting import complete_from
from genscale.models.sequence_part import SequencePart
from genscale.parallel.strategies import check_objective, plan_elsewhere
from genscale.settings.config import PLAN, Config, TrainSettings
from genscale.supervise.run_folder import check_may_continue, check_same_accumulation, recorded_in, run_folder
from genscale.training.hooks import configured_hooks
from genscale.training.setup import (
    averaged_networks,
    check_learning_rates,
    check_same_networks,
    check_settings,
    derive_accumulation,
)


def check_config(config: Config, world_size: int) -> None:
    """All that `genscale train` finds out before the first step, for so many processes elsewhere, without writing into the run
    folder. Opens the data and builds the networks' shapes.

    Raises:
        UserError: what it would refuse, other than for want of memory, disk space or a device.
    """
    check_settings(config)
    configured_hooks(config)
    plan = plan_elsewhere(config.parallel, config.train.precision, world_size, config.optimizer.name)
    asks_planner = config.train.micro_batch_size == PLAN  # which is asked where the run starts
    train: TrainSettings = replace(config.train, micro_batch_size=None) if asks_planner else config.train
    _, accumulation = derive_accumulation(train, world_size, plan.context)
    recorded = recorded_in(run_folder(config.run), config.run.resume)
    check_sources(config, [recorded] if recorded else [])
    chosen = family(config.model.family)
    config, data_settings = complete_from(config, recorded)
    data = chosen.build_data(data_settings, config.run.seed)
    try:
        data.check(config.train.global_batch_size)
        objective = chosen.build_objective(config, data)
        check_objective(plan, config.parallel, objective)
        objective.split_sequences(SequencePart(0, plan.context))
        check_learning_rates(config.optimizer, config.model.family, objective)
        averaged_networks(config.train.ema_half_life, config.model.family, objective)
        if recorded is None and config.run.resume not in ("auto", "never"):
            raise UserError(f"run.resume: '{config.run.resume}' is not a checkpoint folder; use auto, never, or a path like "
                            f"{run_folder(config.run) / 'checkpoints' / 'step-00000100'}")
        if recorded is not None:
            checkpoint = Checkpoint(recorded)
            if config.train.precision == "auto":  # which the other machines settle, as they did before
                precision = checkpoint.config().get("train", {}).get("precision", "auto")
                config = replace(config, train=replace(config.train, precision=precision))
            check_may_continue(config, checkpoint, data.plan())
            if objective.couples_samples and not asks_planner:
                check_same_accumulation(config.train, checkpoint, accumulation, world_size)
            check_same_networks(checkpoint, objective)
            if objective.rewards is not None:
                check_judges(objective.rewards.identities(), checkpoint)
    finally:
        data.close()
