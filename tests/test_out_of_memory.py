"""Runs that do not fit in memory, under a real limit: one line that says what to change, before the first step."""

from __future__ import annotations

import sys

import pytest

from genscale.training.out_of_memory import is_out_of_memory

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml")
# The limit is set as training begins: what torch itself takes differs from machine to machine.
LIMITED = """
import os, resource, sys
from genscale.cli import start
from genscale.training.trainer import Trainer
run = Trainer.run
def limited(self, first_step):
    if os.environ.get("RANK", "0") == os.environ["LIMITED_RANK"]:
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + int(os.environ["LIMIT_MIB"]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return run(self, first_step)
Trainer.run = limited
start(["train", *sys.argv[1:]])
"""
LARGE = ["--model.width", 512, "--model.positions", 256, "--data.sequence_length", 256, "--train.global_batch_size", 64,
         "--train.checkpoint_every", 0]


@pytest.fixture
def limited(tmp_path, genscale_process, tiny_config):
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)

    def run(*arguments, rank=0, mib=400, **options):
        return genscale_process(script, "--config", tiny_config, *LARGE, *arguments, LIMITED_RANK=str(rank), LIMIT_MIB=str(mib),
                                **options)

    return run


def test_a_batch_that_does_not_fit_is_found_before_the_first_step(limited, tiny_run, logged_steps):
    done = limited(command=(sys.executable,))
    assert done.message_of_run() == (
        "out of memory on the host, rank 0, at the dry batch, phase language_model, forward: train.micro_batch_size is 64, "
        "data.sequence_length is 256, parallel.activation_checkpointing is none, parallel.strategy is single; try "
        "train.micro_batch_size 32, then parallel.activation_checkpointing full, then parallel.strategy fsdp2 on more "
        f"processes, then a smaller model; `genscale plan --config {tiny_run}/config.yaml --gpus 1 --gpu cpu` says what takes "
        "how much, and what would fit")
    assert logged_steps(tiny_run) == []


@pytest.mark.slow
@pytest.mark.matrix
def test_without_a_dry_batch_it_is_found_in_the_first_step(limited):
    done = limited("--guards.dry_batch", "false", command=(sys.executable,))
    assert "rank 0, at step 1, phase language_model, forward: " in done.message_of_run()


@pytest.mark.slow
@pytest.mark.matrix  # in CI: fault 7 of tests/faults/test_cases.py
def test_one_process_of_two_that_runs_out_of_memory_ends_both(limited):
    """(The fixture sees to it that they end, and leave nobody behind.)"""
    done = limited(rank=1, command=ACCELERATE)
    assert "out of memory on the host, rank 1, at the dry batch, phase language_model, forward: train.micro_batch_size is 32" \
        in done.one_error()


@pytest.mark.parametrize(("error", "memory"), [
    (MemoryError(), True), (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("shape mismatch"), False),
    (RuntimeError("NCCL Error 1: unhandled cuda error; Cuda failure 'out of memory'"), True),
    (ValueError("out of memory"), False), (RuntimeError("could not create a primitive"), True),
    (RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"), False),
])  # fmt: skip
def test_what_is_about_memory(error, memory):
    assert is_out_of_memory(error) is memory
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("a library's own words") from cause
    except RuntimeError as wrapped:
        assert is_out_of_memory(wrapped) is memory
