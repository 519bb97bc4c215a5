"""Learning-rate schedules: a share of the peak as a pure function of the step, so that there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Iterator

from genscale.settings.config import Config, ScheduleSettings


def learning_rate_share(step: int, steps: int, settings: ScheduleSettings) -> float:
    """Share of the peak learning rate for optimizer step `step` (1 is the first, `steps` the last).

    Warm-up is linear: (step / warmup_steps) for the first warmup_steps steps. Then, with t the progress from 0 (end of
    warm-up) to 1 (the last step) and f the final share: cosine f + (1 - f)(1 + cos(pi t)) / 2 (Loshchilov and Hutter 2017);
    linear 1 - (1 - f) t; constant 1; wsd 1, then linear from 1 to f over the last decay_share of all steps (Hu et al. 2024,
    MiniCPM).
    """
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    final = settings.final_share
    if settings.name == "constant":
        return 1.0
    if settings.name == "wsd":
        decay_steps = max(1, round(settings.decay_share * steps))
        t = max(0.0, (step - (steps - decay_steps)) / decay_steps)
        return 1 - (1 - final) * min(1.0, t)
    t = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    if settings.name == "linear":
        return 1 - (1 - final) * t
    return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2


def never_reached(config: Config) -> Iterator[str]:
    """What a run is too short for that its config asks for, in a line each: nothing is wrong with it, and `train.steps` may
    grow."""
    train, schedule, objective = config.train, config.schedule, config.objective
    steps, warmup = train.steps, schedule.warmup_steps
    falls = schedule.name != "constant"
    if warmup > steps or (falls and warmup == steps):
        peak = learning_rate_share(steps, steps, schedule)
        yield (f"schedule.warmup_steps: {warmup} is the whole of train.steps {steps}: the learning rate ends at {peak:.0%} of "
               f"its peak{' and never falls' if falls else ''}; at most {steps - 1} leaves a step after it")
    elif schedule.name == "wsd" and warmup + round(schedule.decay_share * steps) > steps:
        yield (f"schedule.decay_share: {schedule.decay_share:g} of train.steps {steps} begins within the warm-up of {warmup} "
               f"steps, so that the learning rate never is at its peak; at most {1 - warmup / steps:.2g} begins after it")
    rising = ["kl_warmup_steps"] + ["capacity_steps"] * (getattr(objective, "capacity", None) is not None)
    for name in rising:
        if (wanted := getattr(objective, name, 0)) > steps:
            yield f"objective.{name}: {wanted} is beyond train.steps {steps}, so that its end is never reached"
    samples = steps * train.global_batch_size
    if train.ema_half_life > samples and not train.ema_ramp_up:
        yield (f"train.ema_half_life: {train.ema_half_life:g} samples are more than the {samples} of the whole run, and "
               "train.ema_ramp_up is 0, so that the average is mostly made of initial weights")


def average_decay(step: int, samples: int, half_life: float, ramp_up: float) -> float:
    """Decay of an average of the weights at optimizer step `step` (1 is the first) of `samples` samples each.

    The average forgets half in `half_life` samples, and in no more than `ramp_up` times the samples seen before this step (0 =
    no such limit), so that the first update makes it the weights themselves. (Karras et al. 2020, the code of StyleGAN2-ADA.)
    """
    if ramp_up > 0:
        half_life = min(half_life, ramp_up * (step - 1) * samples)
    return 0.5 ** (samples / max(half_life, 1e-8))
