"""Learning-rate schedules: a share of the peak as a pure function of the step, so that there is no state to save."""

from __future__ import annotations

import math

from genscale.config import ScheduleSettings


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


def average_decay(step: int, samples: int, half_life: float, ramp_up: float) -> float:
    """Decay of an average of the weights at optimizer step `step` (1 is the first) of `samples` samples each.

    The average forgets half in `half_life` samples, and in no more than `ramp_up` times the samples seen before this step (0 =
    no such limit), so that the first update makes it the weights themselves. (Karras et al. 2020, the code of StyleGAN2-ADA.)
    """
    if ramp_up > 0:
        half_life = min(half_life, ramp_up * (step - 1) * samples)
    return 0.5 ** (samples / max(half_life, 1e-8))
