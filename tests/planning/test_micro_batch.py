"""`train.micro_batch_size: plan`: the largest that surely fits, and a run that is none other for it."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.plan import Terms, largest_that_fits, with_size
from genscale.planning.profiles import profile
from genscale.planning.starting import with_planned_size
from genscale.reading import read_yaml
from genscale.settings.parser import load_config
from genscale.testing.runs import Run
from genscale.training.run import check_alike, train


@pytest.mark.parametrize("spare", [0.0, 0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(("gpus", "recomputed"), [(64, "full"), (128, "none"), (32, "selective")])
def test_the_largest_is_found_without_asking_for_all(spare, gpus, recomputed, hand_made, llama):
    config, terms, asked = llama(activation_checkpointing=recomputed), Terms(spare), []

    def planned(size: int):
        asked.append(size)
        return hand_made(with_size(config, size), Machine("h100", gpus, 8), terms)

    share = config.train.global_batch_size // gpus
    found = largest_that_fits(share, planned).step.micro_batch_size
    few = len(asked)
    fitting = [size for size in range(1, share + 1) if share % size == 0 and planned(size).fits]
    assert found == max(fitting, default=1) and few <= 4 and max(asked[:few]) <= 4 * found


def test_a_run_that_asks_the_planner_is_the_run_with_that_number(tiny_config, tmp_path, monkeypatch):
    """What there is of the process is left as it was, and a run that goes on keeps its number on the same devices."""
    config = load_config(FAMILIES, tiny_config, ["--train.global_batch_size=8", "--train.micro_batch_size=plan",
                                                 "--train.steps=2", "--train.checkpoint_every=1"])
    cpu = replace(profile("cpu"), memory_bytes=1_500_000)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    settled = with_planned_size(config, cpu)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.get_default_device() == torch.device("cpu") and not dist.is_initialized() and torch.is_grad_enabled()
    size = settled.train.micro_batch_size
    assert 1 < size < 8 and settled == with_size(config, size)

    folder = train(settled).folder
    assert read_yaml(folder / "config.yaml")["train"]["micro_batch_size"] == size
    numbered = replace(config, run=replace(config.run, name="numbered"))
    assert Run(train(with_size(numbered, size)).folder).digest() == Run(folder).digest()

    ample = replace(cpu, memory_bytes=2**33)
    assert with_planned_size(config, ample).train.micro_batch_size == size
    assert with_planned_size(config, replace(ample, device="another")).train.micro_batch_size == 8
    anew = replace(config, run=replace(config.run, resume="never"))
    assert with_planned_size(anew, ample).train.micro_batch_size == 8
    monkeypatch.setattr("genscale.planning.starting.LOOKING", 0.5)
    with pytest.raises(UserError, match=r"^train.micro_batch_size: plan finds none that surely fits: 1 takes .*; nothing that"):
        with_planned_size(anew, replace(cpu, memory_bytes=2**18))


def test_who_cannot_ask_is_told_a_number(genscale, tiny_config, tmp_path):
    on_cpu = partial(genscale, "train", "--config", tiny_config, "--train.micro_batch_size")
    assert on_cpu("plan").message() == ("train.micro_batch_size: plan is for GPUs, and this run computes on the CPU, where "
                                        "nobody plans it; give a number, as 4")
    assert on_cpu(0).message() == "train.micro_batch_size: must be a whole number of at least 1, plan, or null, not 0"
    assert not (tmp_path / "runs").exists()
    normed = genscale("plan", "--config", "dcgan/dcgan-64", "--gpu", "h100", "--train.micro_batch_size", "plan").message()
    assert normed.startswith("train.micro_batch_size: plan would let the kind of GPU decide which samples of a step are normal")
    assert normed.endswith("; give a number, as 128")


def test_processes_with_other_micro_batches_are_refused():
    check_alike([(4, 2), (4, 2)])
    with pytest.raises(UserError, match=r"^train.micro_batch_size: 4 on rank 0 and 2 on rank 2; give all"):
        check_alike([(4, 2), (4, 2), (2, 4)])


def test_genscale_plan_plans_the_one_that_is_chosen(genscale, tiny_config, monkeypatch):
    monkeypatch.setattr("genscale.verbs.plan.LOOKING", 0.0)
    done = genscale("plan", "--config", tiny_config, "--gpu", "h100", "--train.micro_batch_size", "plan",
                    "--train.precision", "bf16", "--train.global_batch_size", 6)
    assert done.code == 0 and "as the config says: single, micro-batch 6, accumulation 1" in done.out, done.err
