"""The support matrix: what is refused names the combination and the nearest allowed one; all the rest is let through."""

from __future__ import annotations

import importlib.util
from itertools import product

import pytest
import torch

from genscale.errors import UserError
from genscale.families.dcgan.networks import DCGANDiscriminator, DCGANGenerator
from genscale.families.dcgan.objective import ImageGAN
from genscale.families.dcgan.settings import GANSettings
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.parallel.precision import check_float8
from genscale.parallel.strategies import ParallelPlan, check_combination, check_objective, hardly_heeded, plan_elsewhere
from genscale.settings.config import ParallelSettings

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
REFUSED = {
    **{("fp16", strategy, optimizer): "bf16" for strategy in SHARDED for optimizer in ("adamw", "muon")},
    **{(precision, strategy, "muon"): "fsdp2" for precision in ("fp32", "bf16") for strategy in SHARDED[:3]},
    **{("fp8", strategy, optimizer): "fsdp2" for strategy in SHARDED[:3] for optimizer in ("adamw", "muon")},
}


@pytest.mark.parametrize(("precision", "strategy", "optimizer"),
                         list(product(("fp32", "bf16", "fp16", "fp8"), STRATEGIES, ("adamw", "muon"))))
def test_support_matrix(precision: str, strategy: str, optimizer: str) -> None:
    plan = ParallelPlan(strategy, "none", precision, world_size=2)
    instead = REFUSED.get((precision, strategy, optimizer))
    if instead is None and precision != "fp8":
        check_combination(plan, optimizer)
        return
    words = f"{strategy}.*use .*{instead}" if instead else "fp8 needs an NVIDIA GPU.*CPU; use bf16"
    with pytest.raises(UserError, match=words):
        check_combination(plan, optimizer)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_shards_needs_a_group_for_one_process(strategy: str) -> None:
    assert ParallelPlan(strategy, "none", "fp32", 1).needs_group == (strategy not in ("single", "ddp"))


@pytest.mark.parametrize("capability, torchao, words", [
    ((8, 0), True, "Hopper generation or newer, not NVIDIA Old; use bf16"),
    ((9, 0), False, r"torchao, which is not installed; pip install 'genscale\[fp8\]'"),
    ((9, 0), True, None), ((10, 0), True, None)])
def test_fp8_takes_a_new_gpu_and_torchao(capability, torchao, words, monkeypatch) -> None:
    """The GPU's answers stand in for GPUs that are not here; nothing is computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Old")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if torchao else None)
    if words is None:
        check_float8(on_cpu=False)
        return
    with pytest.raises(UserError, match=words):
        check_float8(on_cpu=False)


def gan(norm: str = "group", **settings: float) -> ImageGAN:
    """A GAN whose networks stand on the meta device."""
    model, shape = GANSettings(width=4, latent=8, discriminator_norm=norm), (1, 16, 16)
    with torch.device("meta"):
        generator, discriminator = DCGANGenerator(model, shape), DCGANDiscriminator(model, shape)
    return ImageGAN(generator, discriminator, GANObjectiveSettings(**settings), image_shape=shape, seed=0, latent=8)


@pytest.mark.parametrize(("strategy", "precision"), list(product(STRATEGIES, ("fp32", "bf16"))))
def test_gradient_penalties_are_refused_where_they_would_be_wrong(strategy: str, precision: str) -> None:
    plan = ParallelPlan(strategy, "none", precision, world_size=2)
    check_objective(plan, ParallelSettings(), gan("batch"))  # no penalty, no objection
    for objective, phase in ((gan(gradient_penalty=10.0), "discriminator"), (gan(r1=1.0), "regularisation")):
        words = None
        if strategy == "zero3":
            words = f"parallel.strategy: zero3 with a gradient penalty .phase {phase}.*use zero2 or fsdp2, or spectral norm"
        elif precision == "bf16" and strategy not in ("single", "ddp"):
            words = f"train.precision: bf16 under parallel.strategy {strategy}.*use train.precision fp32"
        if words is None:
            check_objective(plan, ParallelSettings(), objective)
            continue
        with pytest.raises(UserError, match=words):
            check_objective(plan, ParallelSettings(), objective)


@pytest.mark.parametrize(("settings", "norm", "processes", "words"), [
    ({"activation_checkpointing": "selective"}, "group", 1, "activation_checkpointing: selective.*use full"),
    ({"compile": True}, "group", 1, "parallel.compile: true.*use parallel.compile false"),
    ({"activation_checkpointing": "full", "activation_offload": True}, "group", 1, "activation_offload: true with a gradient"),
    ({}, "batch", 2, "2 processes.*on discriminator, which normalises over the batch.*use group"),
    ({"activation_checkpointing": "full"}, "group", 2, None), ({}, "batch", 1, None)])
def test_what_else_takes_no_second_backward(settings, norm, processes, words) -> None:
    plan = ParallelPlan("ddp", "none", "fp32", processes)
    objective = gan(norm, r1=1.0)
    if words is None:
        check_objective(plan, ParallelSettings(**settings), objective)
        return
    with pytest.raises(UserError, match=words):
        check_objective(plan, ParallelSettings(**settings), objective)


@pytest.mark.parametrize(("settings", "words"), [
    ({"strategy": "fsdp2", "shard_size": 6}, "parallel.shard_size: 6 does not divide the 8 processes of the run; use 4"),
    ({"strategy": "fsdp2", "shard_size": 16}, "parallel.shard_size: 16 .*; use 8"),
    ({"context": 3}, "parallel.context: 3 does not divide the 8 processes of the run; use 2"),
    ({"strategy": "ddp", "shard_size": 4}, "parallel.shard_size: 4 has no effect with parallel.strategy ddp"),
    ({"strategy": "zero2", "shard_size": 4}, "parallel.shard_size: 4 has no effect with parallel.strategy zero2"),
    ({"strategy": "zero3", "shard_size": 3}, "parallel.shard_size: 3 does not divide the 8 processes of the run; use 2"),
    ({"strategy": "zero2", "reduce_gradients": "every_micro_batch"}, "reduce_gradients: .*with parallel.strategy zero2"),
    ({"activation_offload": True}, "activation_offload: true with .*activation_checkpointing none .*set .*checkpointing full"),
    ({"activation_checkpointing": "full", "activation_offload": True, "compile": True}, "activation_offload.*compile false"),
    ({"strategy": "fsdp2", "shard_size": 4, "activation_checkpointing": "full", "activation_offload": True}, None),
    ({"strategy": "fsdp2", "shard_size": 4}, None), ({"strategy": "zero3", "shard_size": 4}, None)])  # fmt: skip
def test_groups_of_shards_divide_the_processes_and_offload_has_what_it_needs(settings, words) -> None:
    if words is None:
        plan = plan_elsewhere(ParallelSettings(**settings), "bf16", 8, "adamw")
        assert plan.copies_of_weights(8) == (1 if plan.strategy == "zero3" else 2)  # one in each group; ZeRO's are second ones
        return
    with pytest.raises(UserError, match=words):
        plan_elsewhere(ParallelSettings(**settings), "bf16", 8, "adamw")


@pytest.mark.parametrize(("strategy", "said"), [("zero3", 1), ("zero2", 0), ("fsdp2", 0)])
def test_blocks_that_deepspeed_cuts_apart_are_told_of(strategy, said) -> None:
    settings = ParallelSettings(strategy=strategy, compile=True)
    lines = hardly_heeded(plan_elsewhere(settings, "bf16", 8, "adamw"), settings)
    assert len(lines) == said and all(line.startswith("parallel.compile: true does little") for line in lines)
