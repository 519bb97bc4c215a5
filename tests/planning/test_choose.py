"""Other ways to do the same run: by plans in closed form, whose best can be told by looking at all of them."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest

import genscale
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.as_json import as_dict
from genscale.planning.choose import GOALS, RECOMPUTED, Chooser, gain, measure, replaced, with_size
from genscale.planning.depth import NotForetold
from genscale.planning.plan import Terms
from genscale.planning.report import ways
from genscale.settings.config import ParallelSettings
from genscale.settings.parser import parse_config

MACHINE = Machine("h100", 64, 8)


def every_way(hand_made, llama, machine=MACHINE):
    """All plans that are not refused."""
    found, base = [], llama()
    for strategy, recomputed, size, offload, shard in itertools.product(
            ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"), RECOMPUTED, (1, 2, 4, 8, 16), ("none", "cpu"), (None, 8)):
        config = with_size(replaced(base, strategy=strategy, activation_checkpointing=recomputed, offload=offload,
                                    shard_size=shard), size)
        try:
            found.append(hand_made(config, machine))
        except UserError:
            continue
    return found


@pytest.mark.parametrize("goal", ["memory"])
def test_a_search_finds_the_best_of_all_that_fit(goal, hand_made, llama):
    yours = hand_made(llama(), MACHINE)
    best = min((plan for plan in every_way(hand_made, llama) if plan.fits), key=lambda plan: measure(plan, goal))
    choices = Chooser(yours, goal, planner=hand_made).search()
    assert measure(choices.better[0].plan, goal) == measure(best, goal)
    assert choices.left_out == 0 and all(each.plan.fits for each in choices.fitting)
    ordered = [measure(each.plan, goal) for each in choices.fitting]
    assert ordered == sorted(ordered) and len({each.flags for each in choices.fitting}) == len(ordered)


@pytest.mark.parametrize("goal", ["speed", "cost"])
def test_the_flags_of_a_way_give_its_plan_and_the_same_run(goal, hand_made, llama):
    """Pasted behind the command they are the config that was planned; nothing that changes what is computed is among them."""
    choices = Chooser(hand_made(llama(strategy="ddp"), MACHINE), goal, planner=hand_made).neighbours()
    assert choices.better
    for each in (*choices.fitting[:3], *choices.unfit[-1:]):
        words = each.flags.split() if each.changes else []
        flags = dict(zip(words[::2], words[1::2], strict=True))
        machine = replace(MACHINE, gpus=int(flags.pop("--gpus", 64)))
        machine = replace(machine, gpus_per_node=int(flags.pop("--gpus_per_node", min(8, machine.gpus))))
        assert {*flags} <= {"--train.micro_batch_size", *(f"--parallel.{field.name}" for field in fields(ParallelSettings))}
        config = parse_config(FAMILIES, ["--config=gpt/llama-8b", "--parallel.strategy=ddp",
                                         *(f"{name}={value}" for name, value in flags.items())])
        again = hand_made(config, machine)
        assert (again.peak, again.seconds) == (each.plan.peak, each.plan.seconds)
        assert again.config.train.global_batch_size == 1024 and again.config.optimizer == choices.yours.plan.config.optimizer


def test_ways_that_cannot_be_planned_are_counted_with_the_reason(hand_made, llama):
    """Unlike those that training refuses, which are none."""
    why = "model.layers: 32 blocks cannot be planned from 3 and 4: of 6 these foretell 1.0 MiB, and 2.0 MiB were found; set"

    def planner(config, machine, terms):
        planned = hand_made(config, machine, terms)
        if config.parallel.strategy == "zero1":
            raise NotForetold(f"{why} model.layers to at most 6")
        return planned

    choices = Chooser(hand_made(llama(), MACHINE), planner=planner).neighbours()
    assert len(choices.unplanned) == 1 and as_dict(choices.yours.plan, choices)["choices"]["unplanned"] == [*choices.unplanned]
    assert f"\n1 more cannot be planned: {why.removesuffix('; set')}" in ways(choices)
    assert "cannot be planned" not in ways(Chooser(choices.yours.plan, planner=hand_made).neighbours())


def test_a_way_that_would_take_too_long_is_not_begun(hand_made, llama):
    yours = hand_made(llama(), MACHINE)
    choices = Chooser(yours, seconds=5.0, planner=hand_made, each=6.0).neighbours()
    assert choices.fitting == (choices.yours,) and choices.left_out > 3
    assert f"\nstopped looking, for time was up (not looked at: {choices.left_out}); --search" in ways(choices)


def test_what_does_not_fit_is_told_the_nearest_that_does(hand_made, llama):
    yours = hand_made(llama(strategy="ddp"), MACHINE)
    assert yours.verdict == "does not fit"
    assert Chooser(yours, planner=hand_made).nearest_that_fits().changes == {"parallel.strategy": "fsdp2"}
    tight = hand_made(llama(activation_checkpointing="none"), Machine("a100-40", 64, 8))
    assert not tight.fits
    assert Chooser(tight, planner=hand_made).nearest_that_fits().changes == {"train.micro_batch_size": "1"}
    small = hand_made(llama(), Machine("a100-40", 1, 1))  # no way on one, but on more
    assert int(Chooser(small, planner=hand_made).nearest_that_fits().changes["gpus"]) > 1


def test_fewer_gpus_are_offered_where_the_goal_leaves_their_number_open(hand_made, llama):
    yours = hand_made(llama(), MACHINE, Terms(price=2.0))
    counts = {goal: {each.plan.machine.gpus for each in Chooser(yours, goal, planner=hand_made).neighbours().fitting}
              for goal in GOALS}
    assert counts["speed"] == counts["memory"] == {64}
    assert min(counts["fewest-gpus"]) < 8 and min(counts["cost"]) < 8
    cheapest = Chooser(yours, "cost", planner=hand_made).neighbours().better[0].plan
    assert 0 < gain(cheapest, yours, "cost") == pytest.approx(1 - cheapest.money / yours.money)


def test_micro_batches_that_are_normalised_together_stay_as_many(hand_made):
    """Another number of them would be another run."""
    config = genscale.config("dcgan/dcgan-64", {"train.micro_batch_size": 8, "train.global_batch_size": 128})
    yours = hand_made(config, Machine("h100", 8, 8))
    choices = Chooser(yours, "fewest-gpus", planner=hand_made).search()
    found = [each.plan for each in (*choices.fitting, *choices.unfit)]
    assert {(plan.machine.gpus, plan.step.micro_batch_size, plan.step.accumulation) for plan in found} == {
        (8, 8, 2), (4, 16, 2), (2, 32, 2), (1, 64, 2)}


def test_what_there_is_no_time_for_is_counted(hand_made, llama):
    choices = Chooser(hand_made(llama(), MACHINE), seconds=0.0, planner=hand_made).neighbours()
    assert choices.fitting == (choices.yours,) and not choices.better and choices.left_out > 5


def test_a_plan_as_json_has_its_ways(hand_made, llama):
    yours = hand_made(llama(), MACHINE, Terms(price=2.5, tokens=10e9))
    said = as_dict(yours, Chooser(yours, planner=hand_made).neighbours())
    assert said["memory"]["peak"] == sum(part["bytes"] for part in said["memory"]["parts"]) == yours.peak
    assert said["whole"]["money"] == pytest.approx(2.5 * said["whole"]["gpu_hours"])
    assert said["whole"]["steps"] == 1193  # of 1,024 x 8,192 tokens
    assert said["choices"]["better"][0]["changes"] == {"parallel.activation_checkpointing": "none"}
