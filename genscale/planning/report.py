"""A plan as text: what it takes, how sure that is, and what would be better."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import get_args

from genscale.planning.account import Category
from genscale.planning.choose import Candidate, Choices, gain
from genscale.planning.explain import assumptions
from genscale.planning.plan import Plan
from genscale.planning.wording import count, digits, duration, gib, measured, name, rate, rounded, size

CATEGORIES = get_args(Category)
WIDTH = 69
"""Characters of the left column."""
SMALLEST = 0.003
"""Share of the peak, or of the step, below which a part is not shown."""
SHOWN = 6
"""Better ways in a report."""


def text(plan: Plan) -> str:
    """One run: memory to the left, time to the right."""
    lines = [heading(plan), f"{in_words(plan):<120} {plan.verdict.upper():>12}"]
    left, right = _memory(plan), _time(plan)
    lines += [f"{a:<{WIDTH}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    lines += assumptions(plan)
    if plan.verdict == "too close":
        lines.append(f"too close: {gib(plan.peak)} +- {gib(plan.expected_error)} GiB do not leave {plan.terms.spare:.0%} of "
                     f"{gib(plan.gpu.memory_bytes)} GiB free, so it may run out of memory")
    return "\n".join(lines)


def heading(plan: Plan) -> str:
    """The run and the machine."""
    machine = plan.machine
    between = machine.between_nodes or plan.gpu.between_nodes
    several = machine.gpus > machine.gpus_per_node
    network = f", {rate(between)} between nodes: {'given' if machine.between_nodes else 'assumed'}" if several else ""
    return (f"{plan.config.run.name}: {count(plan.step.parameters)} parameters (exact); {machine.gpus} x {device(plan)} "
            f"({machine.gpus_per_node} a node{network})")


def device(plan: Plan) -> str:
    """What the machine's devices are called."""
    return plan.gpu.device.removeprefix("NVIDIA ")


def in_words(plan: Plan) -> str:
    """What the config says of how the run is spread."""
    settings, train = plan.config.parallel, plan.config.train
    words = [settings.strategy, f"micro-batch {plan.step.micro_batch_size}", f"accumulation {plan.step.accumulation}",
             train.precision]
    if settings.shard_size is not None:
        words[0] += f" in groups of {settings.shard_size}"
    if settings.context > 1:
        words.insert(1, f"context {settings.context}")
    if settings.activation_checkpointing != "none":
        words.append(f"{settings.activation_checkpointing} checkpointing")
    if settings.offload != "none":
        words.append("optimizer state in host memory")
    if settings.compile:
        words.append("compiled")
    return f"as the config says: {', '.join(words)}"


def _memory(plan: Plan) -> list[str]:
    memory = plan.step.memory
    place = ".".join(memory.layer.split(".")[-2:])
    moment = ", ".join(filter(None, (memory.phase, memory.part, place)))
    parts = sorted(memory.parts, key=lambda part: CATEGORIES.index(part.category))
    tensors = [part for part in parts if part.category not in ("caching allocator", "CUDA and NCCL")]
    rest = [part for part in parts if part not in tensors]
    width, gpu = 26, plan.gpu.memory_bytes
    lines = [f"peak memory a GPU (GiB), at {moment}"]
    lines += [f"  {name(part):<{width}}{gib(part.bytes):>7}   {part.certainty}"
              for part in tensors if part.bytes >= SMALLEST * plan.peak]
    lines.append(f"  {'allocated':<{width}}{gib(sum(part.bytes for part in tensors)):>7}")
    for part in rest:
        share = 1 + part.bytes / max(1, sum(each.bytes for each in tensors))
        factor = f" (x{share:.2f})" if part.certainty == "replayed" else ""
        lines.append(f"  {name(part):<{width}}{gib(part.bytes):>7}   {part.certainty}{factor}")
    lines.append(f"  {'in all':<{width}}{gib(plan.peak):>7} +- {gib(plan.expected_error)} of {gib(gpu)} "
                 f"({plan.peak / gpu:.0%}; spare {plan.terms.spare:.0%})")
    return lines


def _time(plan: Plan) -> list[str]:
    time, scale = plan.time, 1 if plan.time.step >= 0.1 else 1000
    lines = [f"time of a step ({'s' if scale == 1 else 'ms'}; modelled)"]
    lines += [f"  {part.category:<24}{scale * part.seconds:>8.{digits(scale * time.step)}f} {part.seconds / time.step:>6.0%}"
              for part in time.parts if part.seconds >= SMALLEST * time.step]
    lines.append(f"    {'step':<22}{scale * time.step:>8.{digits(scale * time.step)}f}")
    speed = plan.units_per_second
    mfu = f"   MFU {time.mfu:.0%}" if time.mfu is not None else "   MFU: no peak known"
    unit = plan.unit if plan.step.tokens else "images" if hasattr(plan.config.data, "size") else plan.unit
    lines.append(f"  {unit}/s {rounded(speed)} ({rounded(speed / plan.machine.gpus)} a GPU){mfu}")
    lines.append(f"  {plan.steps:,} steps: {duration(plan.seconds)}, {rounded(plan.gpu_hours)} GPU h"
                 + (f", {rounded(plan.money)} at {plan.terms.price:g} an hour" if plan.money is not None else "")
                 + f" (+-{time.spread:.0%}{'' if measured(plan) else '; --calibrate: less'})")
    disk = "measured" if plan.gpu.disk else "assumed"
    lines.append(f"  checkpoint {size(plan.step.memory.checkpoint_bytes)} (exact), {duration(plan.checkpoint_seconds)} "
                 f"({disk}), every {plan.steps_between_checkpoints:,} steps: {plan.checkpoint_share:.1%} at most")
    return lines


def ways(choices: Choices) -> str:
    """What would be better, and what would not, as flags to paste."""
    yours, goal = choices.yours.plan, choices.goal
    better = choices.better
    if goal == "fewest-gpus":  # the best of each number
        better = tuple({each.plan.machine.gpus: each for each in reversed(better)}.values())[::-1]
    shown, what = better[:SHOWN], f"better by {goal}" if yours.fits else "what fits"
    lines = [f"{what}, best first{'' if yours.fits else f' by {goal}'}:" if shown else f"{what}: nothing that was looked at"]
    width = max((len(each.flags) for each in shown), default=0)
    lines += [f"  {each.flags:<{width}}  {_beside(each, choices)}" for each in shown]
    if len(better) > SHOWN:
        lines.append(f"  and {len(better) - SHOWN} more (--json lists all)")
    if yours.fits:
        worse = [each for each in choices.fitting if each.changes and each not in choices.better]
        lines += _wrapped("no better: ", [f"{each.flags} ({_beside(each, choices, short=True)})" for each in worse[:4]])
    if unfit := [each for each in choices.unfit if each.changes]:
        lines += _wrapped("do not fit, or might not: ", [_unfit(each) for each in unfit[:4]])
    if choices.unplanned:
        lines.append(f"{len(choices.unplanned)} more cannot be planned: {choices.unplanned[0].partition('; set ')[0]}")
    if choices.left_out:
        lines.append(f"stopped looking, for time was up (not looked at: {choices.left_out}); --search looks at all")
    return "\n".join(lines)


def _unfit(each: Candidate) -> str:
    return f"{each.flags} ({gib(each.plan.peak)} GiB{', too close' if each.plan.verdict == 'too close' else ''})"


def _beside(each: Candidate, choices: Choices, short: bool = False) -> str:
    """What a way brings, beside yours."""
    plan, goal = each.plan, choices.goal if choices.goal != "fewest-gpus" else "speed"
    times = 1 - gain(plan, choices.yours.plan, goal)
    change = f"{times - 1:+.0%}" if times < 2 else f"x{times:.1f}"
    said = [f"{'time' if goal == 'speed' else goal} {change}", f"{gib(plan.peak)} GiB"]
    if not short:
        said += [duration(plan.seconds), f"{rounded(plan.gpu_hours)} GPU h"]
        if plan.money is not None:
            said.append(f"{rounded(plan.money)} in all")
    return ", ".join(said)


def table(plans: Sequence[tuple[str, Plan | str]]) -> str:
    """Several configs on one machine, a line each.

    Args:
        plans: by name; a text where the config is refused, which says why.
    """
    planned = [plan for _, plan in plans if isinstance(plan, Plan)]
    width = max(len(called) for called, _ in plans)
    money = any(plan.money is not None for plan in planned)
    lines = [f"{'':<{width}}  {'':<12}{'parameters':>10}{'GiB a GPU':>15}{'a step':>10}{'units/s':>12}{'MFU':>6}{'in all':>14}"
             f"{'GPU h':>10}{'money' if money else '':>10}".rstrip()]
    for called, plan in plans:
        if isinstance(plan, str):
            lines.append(f"{called:<{width}}  refused: {plan}")
            continue
        memory = f"{gib(plan.peak)} of {gib(plan.gpu.memory_bytes)}"
        mfu = "" if plan.time.mfu is None else f"{plan.time.mfu:.0%}"
        lines.append(f"{called:<{width}}  {plan.verdict:<12}{count(plan.step.parameters):>10}{memory:>15}"
                     f"{duration(plan.time.step):>10}{rounded(plan.units_per_second):>12}{mfu:>6}{duration(plan.seconds):>14}"
                     f"{rounded(plan.gpu_hours):>10}{'' if plan.money is None else rounded(plan.money):>10}".rstrip())
    return "\n".join(lines)


def _wrapped(head: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    return textwrap.wrap(head + "; ".join(entries), 132, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
