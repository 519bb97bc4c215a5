"""`parallel.context`: sequences that groups of processes compute together are computed as one process does."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.inspection.config_check import check_config
from genscale.settings.parser import parse_config
from genscale.testing import processes as apart
from genscale.testing.runs import Run, flags
from genscale.tracking.metrics_file import read_metrics

CONTEXT_WORKER = Path(__file__).with_name("context_worker.py")
SHAPE = {"model.heads": 4, "model.width": 32, "model.positions": 32, "data.sequence_length": 32}
OPTIONS = {
    **SHAPE, "model.layers": 2, "model.preset": "llama", "model.kv_heads": 1, "model.qk_norm": True, "model.window": 12,
    "model.dropout": 0.1, "model.attention_dropout": 0.1, "data.separate_documents": True, "data.source": "sums",
    "data.prompt_column": "prompt", "data.answer_column": "written", "data.filters": {"written": ["9", "99", "031", "401"]},
    "data.lanes": 12, "data.validation_blocks": 7,
    "train.steps": 6, "train.global_batch_size": 12, "train.micro_batch_size": 6, "train.log_every": 1,
    "train.evaluate_every": 3, "train.checkpoint_every": 3, "train.sample_every": 0, "train.precision": "fp32",
    "schedule.warmup_steps": 10, "optimizer.lr": 1e-3, "run.trace": True, "tracking.wandb": "disabled",
    "parallel.strategy": "ddp",
}  # fmt: skip
"""All that depends on where a token stands: one head of keys for all queries, angles by document, masks, dropout, and answers
alone to learn."""
SPLIT = {"parallel.context": 2}
FSDP2 = {"parallel.strategy": "fsdp2"}


@pytest.fixture(scope="module")
def found(answers) -> dict[str, Any]:
    """Of two processes: whole runs, of which those called `whole` read different samples, and the others the same ones and
    compute half of each; and what a step of one sequence keeps."""
    whole = {**OPTIONS, "train.micro_batch_size": 3}
    return answers(CONTEXT_WORKER, {
        "whole": {"run": whole},
        "ddp": {"run": {**OPTIONS, **SPLIT}},
        "ddp again": {"run": {**OPTIONS, **SPLIT}, "again_from": ["ddp", 3]},
        "fsdp2": {"run": {**OPTIONS, **SPLIT, **FSDP2, "train.sample_every": 6}},
        "to whole": {"run": {**whole, "train.steps": 5, "train.checkpoint_every": 5}, "again_from": ["ddp", 3]},
        "and back": {"run": {**OPTIONS, **SPLIT, **FSDP2}, "again_from": ["to whole", 5]},
        "one sequence, whole": {"context": 1},
        "one sequence, split": {"context": 2}})


@pytest.fixture(scope="module")
def split_runs(found) -> dict[str, Run]:
    return {name: Run(Path(folder)) for name, folder in found.items() if isinstance(folder, str)}


def check_same(run: Run, whole: Run, difference) -> None:
    assert run.order() == whole.order()
    for name in ("loss", "grad_norm", "validation_loss"):
        values, expected = run.values(name), whole.values(name)
        assert len(values) == len(expected) > 1 and difference(values, expected) <= 1e-5, name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_split_sequences_are_the_same_run(strategy, split_runs, difference):
    check_same(split_runs[strategy], split_runs["whole"], difference)


def test_a_trace_has_the_same_draws_and_samples(split_runs):
    traces = [read_metrics(split_runs[name].folder / "trace.jsonl")[1:] for name in ("whole", "ddp", "fsdp2")]
    inputs = [[(line["batch"], line["draws"]) for line in trace] for trace in traces]
    assert inputs[0] == inputs[1] == inputs[2] and len(inputs[0]) == 6


def test_a_resume_is_exact_and_may_split_otherwise(split_runs, difference):
    again, straight = split_runs["ddp again"], split_runs["ddp"]
    assert again.resumed_from() == ["step-00000003"]
    assert again.digest() == straight.digest() and again.losses() == straight.losses()
    back = split_runs["and back"]
    assert back.resumed_from() == ["step-00000003", "step-00000005"]
    assert back.order() == split_runs["whole"].order()
    assert difference(back.losses(), split_runs["whole"].losses()) <= 1e-5


def test_a_process_keeps_half_and_all_together_have_the_gradient(found):
    whole, split = (found[f"one sequence, {how}"] for how in ("whole", "split"))
    assert 0.45 < split["kept"] / whole["kept"] < 0.55
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(split["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


LONGER = {**OPTIONS, "model.kv_heads": 2, "train.steps": 10, "train.checkpoint_every": 0, "train.micro_batch_size": 3}
NOTHING_DROPPED = {"model.dropout": 0, "model.attention_dropout": 0}
"""Compiled draws are compared in tests/models/test_dropout.py: those of a whole block take a minute to compile."""
RECOMPUTED = {**SPLIT, **FSDP2, "parallel.activation_checkpointing": "full"}
WAYS = {
    2: {"zero2": {**SPLIT, "parallel.strategy": "zero2"},
        "offloaded": {**RECOMPUTED, "parallel.activation_offload": True},
        "selective": {**RECOMPUTED, "parallel.activation_checkpointing": "selective"}},
    4: {"ddp": {"parallel.context": 4}, "zero3": {**SPLIT, "parallel.strategy": "zero3"},
        "groups": {**SPLIT, **FSDP2, "parallel.shard_size": 2}},
}  # fmt: skip
MORE_WAYS = {2: {"zero1": {**SPLIT, "parallel.strategy": "zero1"},
                 "compiled": {**SPLIT, **NOTHING_DROPPED, "parallel.compile": True}},
             4: {"fsdp2": {**SPLIT, **FSDP2}}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "ways"), [
    *WAYS.items(), *(pytest.param(*more, marks=pytest.mark.matrix) for more in MORE_WAYS.items())])  # fmt: skip
def test_equals_one_process_over_ten_steps(processes, ways, answers, train, difference, tmp_path):
    split = answers(CONTEXT_WORKER, {name: {"run": {**LONGER, **more}} for name, more in ways.items()}, processes)
    one = train(tmp_path / "one", "single", **LONGER)
    for name, folder in split.items():
        alone = train(tmp_path / "other", "single", **{**LONGER, **NOTHING_DROPPED}) if name == "compiled" else one
        check_same(Run(Path(folder)), alone, difference)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_bit_for_bit(train, tmp_path):
    settings = {**OPTIONS, **SPLIT, "train.steps": 30, "train.checkpoint_keep": 100}
    straight = train(tmp_path / "straight", "ddp", **settings)
    words = flags({**settings, "run.dir": tmp_path, "run.name": "killed"})
    running = apart.start("train", *words, command=apart.group(2, *apart.GENSCALE[1:]))
    killed = Run(tmp_path / "killed")
    while running.poll() is None and not killed.checkpoints():
        time.sleep(0.01)
    running.kill()
    assert running.finish().code == -signal.SIGKILL
    begun = killed.latest().path.name
    again = train(killed.folder, "ddp", **settings)
    assert again.resumed_from() == [begun]
    assert again.digest() == straight.digest() and again.losses() == straight.losses()


@pytest.mark.parametrize(("settings", "said"), [
    ({"model.heads": 3, "model.width": 48}, "parallel.context: 2 does not divide model.heads 3, .*values that do: 1 or 3"),
    ({"data.sequence_length": 31}, "parallel.context: 2 does not divide data.sequence_length 31, .*values that do: 1 or 31"),
    ({"parallel.context": 3}, "parallel.context: 3 does not divide the 4 processes of the run; use 2"),
    ({"train.global_batch_size": 9}, "train.global_batch_size: 9 does not divide by 2 groups of 2 processes; .* 8 or 10"),
    ({"model.family": "points"}, "parallel.context: 2 splits sequences, which the family gpt can, and this one cannot; use 1"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused_before_the_first_step(settings, said, tmp_path):
    own = {} if "model.family" in settings else SHAPE
    words = {"train.global_batch_size": 8, **own, **SPLIT, "run.dir": tmp_path, **settings}
    with pytest.raises(UserError, match=said):
        check_config(parse_config(FAMILIES, flags(words)), 4)
