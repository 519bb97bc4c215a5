"""A planned step holds and sends what a real step of two processes does."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from genscale.families import FAMILIES
from genscale.planning import depth
from genscale.planning import step as planning
from genscale.planning.account import Machine
from genscale.planning.explain import assumptions
from genscale.planning.trace import plan_step
from genscale.settings.parser import parse_config
from genscale.testing.workers import ask

LAYERS, WIDTH, MLP = 3, 128, 200
GPT = {"model.family": "gpt", "model.layers": LAYERS, "model.width": WIDTH, "model.heads": 4, "model.mlp_width": MLP,
       "model.vocab_size": 2048, "model.positions": 64, "model.loss_chunk": 32, "data.sequence_length": 64,
       "data.tokenizer": "not/here", "train.micro_batch_size": 2}


def flags(**others: object) -> list[str]:
    sections = {"strategy": "parallel", "shard_size": "parallel", "context": "parallel", "precision": "train",
                "global_batch_size": "train", "name": "optimizer"}
    settings = {**GPT, **{f"{sections[key]}.{key}": each for key, each in others.items()}}
    return [f"--{key}={value}" for key, value in settings.items()]


def planned(*settings: str, gpus: int = 2):
    return plan_step(parse_config(FAMILIES, list(settings)), Machine("cpu", gpus, 2))


def sent_by_the_optimizer(step) -> dict[str, int]:
    sent: dict[str, float] = defaultdict(float)
    for each in step.exchanges:
        if each.part == "optimizer":
            sent[each.name] += each.bytes * each.count
    return {name: round(size) for name, size in sent.items()}


@pytest.mark.slow
def test_a_step_of_two_processes_holds_and_sends_what_was_planned(tmp_path):
    """ZeRO's parts are stand-ins for DeepSpeed's code, DDP's for its C++ code; gradients of several micro-batches."""
    cases = {f"{strategy} {precision} {batch // 4}": {"strategy": strategy, "precision": precision, "global_batch_size": batch}
             for strategy, precision, batch in [("zero1", "bf16", 8), ("zero3", "fp32", 4), ("zero3", "bf16", 8),
                                                ("fsdp2", "bf16", 8)]}
    cases |= {f"muon {strategy}": {"strategy": strategy, "precision": "fp32", "global_batch_size": 4, "name": "muon"}
              for strategy in ("ddp", "fsdp2")}
    cases |= {f"split {strategy}": {"strategy": strategy, "precision": "fp32", "global_batch_size": 4, "context": 2}
              for strategy in ("ddp", "fsdp2")}
    real = ask(Path(__file__).with_name("counted_worker.py"),
               {name: {"strategy": case["strategy"], "precision": case["precision"], "flags": flags(**case)}
                for name, case in cases.items()}, tmp_path)
    for name, case in cases.items():
        step = planned(*flags(**case))
        assert step.memory.peak == pytest.approx(real[name]["peak"], rel=0.03), name
        if name.startswith("muon"):
            assert sent_by_the_optimizer(step) == real[name]["sent"], name


def gathered(step, part: str, ranks: int) -> float:
    """Bytes of weights."""
    return sum(each.bytes * each.count for each in step.exchanges
               if each.name == "all_gather" and (each.part, each.ranks) == (part, ranks))


@pytest.mark.slow
def test_second_copies_are_held_and_gathered_from_as_planned(tmp_path, monkeypatch):
    """Of four processes in groups of two, with one micro-batch and with three; of a network that gives nothing back after its
    forward, and of one that does. A step gathers from all once."""
    spread = {"strategy": "zero3", "precision": "bf16"}
    cases = {(batches, gives_back): {**spread, "shard_size": 2, "global_batch_size": 8 * batches}
             for batches in (1, 3) for gives_back in (False, True)}
    variants = {f"{key}": {**spread, "flags": flags(**case), **({"live": 1} if key[1] else {})} for key, case in cases.items()}
    real = ask(Path(__file__).with_name("counted_worker.py"), variants, tmp_path, processes=4)
    for (batches, gives_back), case in cases.items():
        monkeypatch.setattr(planning, "LIVE", 1 if gives_back else 10**9)
        step, found = planned(*flags(**case), gpus=4), real[f"{(batches, gives_back)}"]
        assert step.memory.peak == pytest.approx(found["peak"], rel=0.03)
        assert gathered(step, "forward", 4) == pytest.approx(found["gathered"]["forward", 4], rel=0.03)
        whole, embedding = found["gathered"]["forward", 4], 2 * 2048 * WIDTH  # which the head has just used
        later = {("forward", 2): (batches - 1) * whole, ("backward", 2): batches * gives_back * (whole - embedding)}
        assert found["gathered"] == {("forward", 4): whole, **{key: size for key, size in later.items() if size}}
        # A plan gathers for a backward all of it, and counts the later forwards to the backwards before them.
        assert gathered(step, "backward", 2) == pytest.approx((batches - 1 + batches * gives_back) * whole, rel=0.03)
        assert gathered(step, "backward", 4) == 0


def test_muon_sends_each_matrix_to_all():
    """Whole in fp32, the one process's update to the other; under FSDP2 it is gathered before, its rows rounded up."""
    matrices = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (MLP, WIDTH), (WIDTH, MLP)]
    whole = LAYERS * sum(4 * rows * columns for rows, columns in matrices)
    ddp, fsdp2 = (sent_by_the_optimizer(planned(*flags(strategy=strategy, precision="fp32", global_batch_size=4, name="muon")))
                  for strategy in ("ddp", "fsdp2"))
    assert ddp["broadcast"] == fsdp2["broadcast"] == fsdp2["all_gather"] == whole
    assert "all_gather" not in ddp


def test_what_activation_offload_keeps_is_on_the_host():
    """Of each block its input, which is there on the device while its block is computed anew."""
    settings = [*flags(strategy="ddp", precision="bf16", global_batch_size=8), "--parallel.activation_checkpointing=full"]
    kept, offloaded = planned(*settings), planned(*settings, "--parallel.activation_offload=true")
    inputs = 2 * 64 * WIDTH * 4  # (batch, time, width) in fp32: the stream of a network under autocast
    assert (kept.memory.host, offloaded.memory.host) == (0, LAYERS * inputs)
    on_device = [sum(part.bytes for part in step.memory.parts if part.category == "activations") for step in (kept, offloaded)]
    assert on_device[0] - on_device[1] == LAYERS * inputs


def test_a_report_says_what_it_takes_for_granted(hand_made, llama):
    def assumed(memory: int = 0, **parallel: object) -> list[str]:
        plan = hand_made(llama(**parallel), Machine("h100", 16, 8))
        step = replace(plan.step, memory=replace(plan.step.memory, host=memory))
        return [line.partition(":")[0] for line in assumptions(replace(plan, step=step))]

    assert (assumed(compile=False), assumed(compile=True), assumed(2**30, compile=False)) == ([], ["compiled"], ["offloaded"])


@pytest.mark.slow
def test_muon_of_a_deep_network_makes_its_share_of_the_matrices_orthogonal(monkeypatch):
    """Of three or four blocks' matrices a process makes one or two, of 15 blocks' as many as there are rounds; those of the
    shallow networks are the larger ones."""
    settings = flags(strategy="ddp", precision="fp32", global_batch_size=16, name="muon")
    config = parse_config(FAMILIES, [*settings, "--model.layers=15"])

    def orthogonal() -> float:
        step = plan_step(config, Machine("h100", 8, 8))
        return sum(each.flops * each.count for each in step.operations if each.part == "optimizer" and each.kind == "product")

    few = orthogonal()
    monkeypatch.setattr(depth, "CHECK", 15)  # as deep as it is: all of it is traced
    assert 0.95 < few / orthogonal() < 1.6
