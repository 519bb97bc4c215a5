"""`train.micro_batch_size: plan`: the largest that surely fits, and a run that is none other for it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.planning.account import Machine
from genscale.planning.plan import Terms, largest_that_fits, with_size
from genscale.planning.profiles import profile
from genscale.planning.starting import _read, answered, recorded_size, with_planned_size
from genscale.reading import read_yaml
from genscale.settings.parser import load_config
from genscale.testing.processes import run
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


SETTINGS = ("--train.global_batch_size=8", "--train.micro_batch_size=plan", "--train.steps=2", "--train.checkpoint_every=1")


def test_a_run_that_goes_on_keeps_its_number_on_the_same_devices(tiny_config):
    config, cpu = load_config(FAMILIES, tiny_config, SETTINGS), replace(profile("cpu"), memory_bytes=1_500_000)
    state = torch.get_rng_state()
    size = answered(config, Machine("cpu", 1, 1), cpu)["size"]
    assert 1 < size < 8 and torch.equal(state, torch.get_rng_state()) and not dist.is_initialized()

    folder = train(with_size(config, size)).folder
    assert read_yaml(folder / "config.yaml")["train"]["micro_batch_size"] == size
    assert with_planned_size(config, replace(cpu, memory_bytes=2**33)) == with_size(config, size)
    assert recorded_size(config, replace(cpu, device="another"), 1) is None and recorded_size(config, cpu, 2) is None
    assert recorded_size(replace(config, run=replace(config.run, resume="never")), cpu, 1) is None


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("ddp", "zero2"))])
def test_two_processes_that_ask_are_the_two_with_that_number(strategy, tiny_config, tmp_path):
    """fsdp2 is what a process that had planned by itself would disturb: it would take the first one's part of the weights."""
    def trained(name: str, size: str) -> str:
        done = run(Path(__file__).with_name("planned_size_worker.py"), tiny_config, 3_000_000, *SETTINGS, f"--run.name={name}",
                   f"--train.micro_batch_size={size}", f"--parallel.strategy={strategy}",
                   command=(sys.executable, "-m", "genscale.testing.group", "2"))
        assert done.code == 0, done.err
        assert done.err.count("train.micro_batch_size: plan is ") == (size == "plan")
        return Run(tmp_path / "runs" / name).digest()

    found = trained("asked", "plan")
    size = read_yaml(tmp_path / "runs" / "asked" / "config.yaml")["train"]["micro_batch_size"]
    assert trained("given", str(size)) == found


def test_where_nothing_fits_the_nearest_is_named(tiny_config, monkeypatch):
    monkeypatch.setattr("genscale.planning.starting.LOOKING", 0.5)
    config = load_config(FAMILIES, tiny_config, SETTINGS)
    with pytest.raises(UserError, match=r"^train.micro_batch_size: plan finds none that surely fits: 1 takes .*; nothing that"):
        answered(config, Machine("cpu", 1, 1), replace(profile("cpu"), memory_bytes=2**18))


def test_who_cannot_ask_is_told_a_number(genscale, tiny_config, tmp_path):
    on_cpu = partial(genscale, "train", "--config", tiny_config, "--train.micro_batch_size")
    assert on_cpu("plan").message() == ("train.micro_batch_size: plan is for GPUs, and this run computes on the CPU, where "
                                        "nobody plans it; give a number, as 4")
    assert on_cpu(0).message() == "train.micro_batch_size: must be a whole number of at least 1, plan, or null, not 0"
    assert not (tmp_path / "runs").exists()
    normed = genscale("plan", "--config", "dcgan/dcgan-64", "--gpu", "h100", "--train.micro_batch_size", "plan").message()
    assert normed.startswith("train.micro_batch_size: plan would let the kind of GPU decide which samples of a step are normal")
    assert normed.endswith("; give a number, as 128")


def test_a_family_of_a_script_cannot_be_asked_for():
    with pytest.raises(UserError, match=r"^train.micro_batch_size: plan is asked in a process of its own, .*mine.*; give a n"):
        _read("model: {family: mine}")


def test_processes_with_other_micro_batches_are_refused():
    check_alike([(4, 2), (4, 2)])
    with pytest.raises(UserError, match=r"^train.micro_batch_size: 4 on rank 0 and 2 on rank 2; give all"):
        check_alike([(4, 2), (4, 2), (2, 4)])


def test_genscale_plan_plans_the_one_that_is_chosen(genscale, tiny_config, monkeypatch):
    monkeypatch.setattr("genscale.verbs.plan.LOOKING", 0.0)
    done = genscale("plan", "--config", tiny_config, "--gpu", "h100", "--train.micro_batch_size", "plan",
                    "--train.precision", "bf16", "--train.global_batch_size", 6)
    assert done.code == 0 and "as the config says: single, micro-batch 6, accumulation 1" in done.out, done.err
