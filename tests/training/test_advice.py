"""What a run that went wrong is told to try: nothing that it has already, and nothing that would be refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from genscale.data.text.settings import TextDataSettings
from genscale.errors import UserError, nearest
from genscale.families.gpt.settings import GPTSettings
from genscale.families.points.settings import PointsGANSettings
from genscale.objectives.base import Phase
from genscale.parallel.precision import native_precision
from genscale.parallel.strategies import ParallelPlan
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings, ScheduleSettings, TrainSettings
from genscale.supervise.run_folder import check_free_space
from genscale.testing.objectives import BareObjective
from genscale.training.non_finite import calmer
from genscale.training.out_of_memory import smaller


def config(model=None, **sections) -> Config:
    return Config(model=model or GPTSettings(), data=TextDataSettings(source="x"), **sections)


@pytest.mark.parametrize(("train", "warmup", "words"), [
    ({"precision": "fp32"}, 0, "try a lower optimizer.lr, a longer schedule.warmup_steps, or a lower train.clip"),
    ({"precision": "fp32", "clip": 0.0}, 100, "try a lower optimizer.lr, or train.clip 1"),
    ({"precision": "bf16"}, 100, "try a lower optimizer.lr, a lower train.clip, or train.precision fp32 instead of bf16"),
    ({"precision": "fp8"}, 100, "try a lower optimizer.lr, a lower train.clip, or train.precision bf16 instead of fp8"),
    ({"precision": "fp16"}, 100, "try a lower optimizer.lr, a lower train.clip, or train.precision "
                                 f"{native_precision(not torch.cuda.is_available())} instead of fp16"),
])  # fmt: skip
def test_a_run_that_diverged_is_told_what_it_has_not_tried(train, warmup, words):
    assert calmer(TrainSettings(steps=100, **train), ScheduleSettings(warmup_steps=warmup)) == words


class Stack(torch.nn.Module):
    def blocks(self):
        return [self]


def plain(network: torch.nn.Module, second_order: bool = False) -> BareObjective:
    return BareObjective({"net": network}, [Phase("net", "net", dict, len, second_order=second_order)])


class Splitting(BareObjective):
    def split_sequences(self, part):
        pass


FULL = ParallelSettings(activation_checkpointing="full")
BLOCKS, NONE = plain(Stack()), plain(torch.nn.Linear(1, 1))
SPLITTING = Splitting({"net": Stack()}, [Phase("net", "net", dict, len)])
FSDP = "parallel.strategy fsdp2 on more processes"


@pytest.mark.parametrize(("objective", "parallel", "strategy", "precision", "size", "expected"), [
    (BLOCKS, ParallelSettings(), "single", "fp32", 64,
     ["train.micro_batch_size 32", "parallel.activation_checkpointing full", FSDP, "a smaller model"]),
    (BLOCKS, FULL, "ddp", "fp32", 1, [FSDP, "a smaller model"]),
    (BLOCKS, FULL, "fsdp2", "fp32", 1, ["more processes", "a smaller model"]),
    (SPLITTING, FULL, "fsdp2", "fp32", 2, ["train.micro_batch_size 1", "more processes", "a smaller model"]),
    (SPLITTING, FULL, "fsdp2", "fp32", 1, ["more processes", "parallel.context 2 on more processes", "a smaller model"]),
    (SPLITTING, replace(FULL, context=4), "fsdp2", "fp32", 1, ["more processes", "a smaller model"]),  # of 12 heads
    (NONE, ParallelSettings(), "ddp", "fp32", 15, ["train.micro_batch_size 5", FSDP, "a smaller model"]),
    (NONE, ParallelSettings(), "single", "fp16", 1, ["a smaller model"]),  # which fsdp2 refuses
    (plain(Stack(), True), FULL, "ddp", "bf16", 1, ["a smaller model"]),  # so it does a penalty in bf16
    (plain(Stack(), True), FULL, "ddp", "fp32", 1, [FSDP, "a smaller model"]),
])  # fmt: skip
def test_a_run_too_large_for_memory_is_told_what_helps(objective, parallel, strategy, precision, size, expected):
    assert smaller(config(parallel=parallel), ParallelPlan(strategy, "none", precision, 1), size, objective) == expected


def test_batch_normalisation_is_not_left_with_one_value():
    model = PointsGANSettings(generator_norm="batch")
    plan = ParallelPlan("single", "none", "fp32", 1)
    assert smaller(config(model), plan, 4, NONE)[0] == "train.micro_batch_size 2"
    assert smaller(config(model), plan, 2, NONE)[0] == FSDP
    assert smaller(config(optimizer=OptimizerSettings(name="muon")), plan, 2, NONE)[1] == FSDP


def test_the_nearest_of_what_there_is_is_not_the_word_itself():
    assert nearest("0.0", ["0.0", "1.0"]) == " (did you mean '1.0'?)"
    assert nearest("cat", ["cat", "dog"]) == ""


@pytest.mark.parametrize(("keep", "words"), [(4, "free some space, lower train.checkpoint_keep (4), or set"),
                                             (1, "free some space, or set --run.dir")])  # fmt: skip
def test_fewer_checkpoints_are_no_advice_to_a_run_that_keeps_one(keep, words, tmp_path):
    with pytest.raises(UserError) as refused:
        check_free_space(tmp_path, 10**15, 0, TrainSettings(checkpoint_keep=keep), print)
    assert words in str(refused.value)
