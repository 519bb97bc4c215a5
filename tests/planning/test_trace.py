"""A step is planned by tracing it: its bytes are those of the step that runs, at any depth and on any number of processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import genscale
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.families.entry import Family
from genscale.planning import depth
from genscale.planning.account import Machine
from genscale.planning.allocator import replay
from genscale.planning.recorder import Moment
from genscale.planning.summary import Peak, Summary
from genscale.planning.trace import plan_step
from genscale.settings.parser import load_config, parse_config
from genscale.testing.workers import ask

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
NEEDS_A_RUN = ("digits-threes.yaml",)  # what it begins from says what its networks are
# Sizes that no number of processes divides.
GPT = ["model.layers=3", "model.width=36", "model.heads=3", "model.mlp_width=101", "model.vocab_size=259", "model.positions=24",
       "data.sequence_length=24", "train.global_batch_size=16", "train.micro_batch_size=1", "data.tokenizer=not/here"]


def gpt(*settings: str, like: list[str] = GPT) -> list[str]:
    return [f"--{each}" for each in ("model.family=gpt", *like, *settings)]


def planned(*settings: str, gpus: int = 1, kind: str = "cpu"):
    return plan_step(parse_config(FAMILIES, gpt(*settings)), Machine(kind, gpus, min(gpus, 8)))


def held(step, category: str) -> int:
    return sum(part.bytes for part in step.memory.parts if part.category == category)


@pytest.fixture(scope="module")
def plan_memory():
    """The benchmark that counts a real step."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import plan_memory
    finally:
        sys.path.pop(0)
    return plan_memory


def test_the_bytes_of_a_step_are_those_that_are_counted(plan_memory):
    settings = ["parallel.activation_checkpointing=selective", "train.precision=bf16", "train.ema_half_life=1000"]
    found = plan_memory.compare(plan_memory.config_of("gpt, llama", settings))
    assert found["planned"] == pytest.approx(found["counted"], rel=0.001)


def test_the_bytes_of_a_step_by_reward_are_those_that_are_counted(plan_memory):
    """With the classifier that judges, which is one of the networks."""
    found = plan_memory.compare(plan_memory.config_of("image_reward", ["train.precision=bf16", "objective.group=16"]))
    assert found["planned"] == pytest.approx(found["counted"], rel=0.001)


@pytest.mark.slow
def test_the_bytes_of_every_family_are_those_that_are_counted(plan_memory):
    off = {(name, *settings): found["ratio"] for name, settings in list(plan_memory.cases())[::5]
           if abs((found := plan_memory.compare(plan_memory.config_of(name, settings)))["ratio"] - 1) > 0.03}
    assert off == {}


REST = {f"{strategy} {precision}": {"strategy": strategy, "precision": precision}
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp2") for precision in ("fp32", "bf16")}  # fmt: skip


@pytest.mark.slow
def test_what_rests_on_two_processes_is_planned_to_the_byte(tmp_path):
    flags = {name: [f"parallel.strategy={each['strategy']}", f"train.precision={each['precision']}", "train.ema_half_life=100",
                    "train.global_batch_size=2"] for name, each in REST.items()}
    real = ask(Path(__file__).with_name("rest_worker.py"),
               {name: {**each, "flags": gpt(*flags[name])} for name, each in REST.items()}, tmp_path)
    assert {name: planned(*flags[name], gpus=2).memory.at_rest for name in REST} == \
        {name: held[0] for name, held in real.items()}


@pytest.mark.slow
def test_a_deep_network_is_foretold_from_shallow_ones(monkeypatch):
    settings = ["parallel.strategy=fsdp2", "model.layers=9", "train.precision=bf16",
                "parallel.activation_checkpointing=selective"]
    few = planned(*settings, gpus=8, kind="h100")
    monkeypatch.setattr(depth, "CHECK", 9)  # as deep as it is: all of it is traced
    all_of_it = planned(*settings, gpus=8, kind="h100")
    for category in ("weights", "activations", "gathered weights", "logits and loss"):
        assert held(few, category) == pytest.approx(held(all_of_it, category), rel=1e-3)
    assert few.memory.at_rest == all_of_it.memory.at_rest
    for step_of in (lambda step: math.fsum(each.flops * each.count for each in step.operations),
                    lambda step: math.fsum(each.bytes * each.count for each in step.exchanges)):
        assert step_of(few) == pytest.approx(step_of(all_of_it), rel=1e-6)


def test_a_gpu_keeps_masks_only_of_what_is_not_compiled():
    long = ["model.layers=1", "model.positions=256", "data.sequence_length=256", "model.width=48", "train.precision=bf16"]
    masks = ["data.separate_documents=true", "model.window=100"]
    plain, dense, blocks = (held(planned(*long, *each, kind="h100"), "activations")
                            for each in ([], masks, [*masks, "parallel.compile=true"]))
    assert blocks == pytest.approx(plain, rel=0.01)
    assert dense > plain + 2 * 256 * 256  # in bf16, of each layer


@pytest.mark.slow
def test_a_gpu_keeps_masks_of_what_zero3_recomputes():
    settings = ["model.layers=1", "model.positions=256", "data.sequence_length=256", "parallel.strategy=zero3",
                "parallel.activation_checkpointing=full", "data.separate_documents=true"]
    dense, compiled = (planned(*settings, f"parallel.compile={each}", gpus=2, kind="h100") for each in ("false", "true"))
    assert held(compiled, "activations") == held(dense, "activations")


@pytest.mark.parametrize("grows", [lambda layers: 7 + 5 * layers, lambda layers: 100 * layers**2])
def test_blocks_that_do_not_add_up_are_refused(grows):
    def trace(layers: int) -> Summary:
        place, moment = ("phase", 0, "backward", "in"), Moment(layer=f"layers.{layers - 1}")
        return Summary({place: Peak({"activations": grows(layers)}, moment)}, {}, {}, layers, kept=grows(layers) / 10)

    if grows(2) - grows(1) == grows(3) - grows(2):
        deep = depth.foretold(trace, 80)
        assert (deep.peak.total, deep.at_rest, deep.kept) == (407, 80, pytest.approx(40.7))
        assert deep.peak.moment.layer == "layers.79"
    else:
        with pytest.raises(UserError, match="model.layers: 80 blocks cannot be planned from 3 and 4: of 6 these foretell"):
            depth.foretold(trace, 80)


def test_products_are_those_of_the_formula():
    """6 N a token, of which the network knows itself."""
    step = planned("parallel.activation_checkpointing=full", "train.precision=fp32")
    forward, again = (sum(each.flops * each.count for each in step.operations if each.kind == "product" and each.part == part)
                      for part in ("forward", "recomputation"))
    layer = 36 * 4 * 36 + 2 * 36 * 101
    # The loss makes its gradient in the forward pass.
    assert forward == pytest.approx(16 * 24 * 2 * (3 * layer + 259 * 36) + 16 * 24 * 4 * 259 * 36 * _loss_is_chunked(step))
    assert again == pytest.approx(16 * 24 * 2 * 3 * (layer - 36 * 101))  # nothing needs the block's last product again


def _loss_is_chunked(step) -> bool:
    return any(each.kind == "product" and each.head and each.part == "forward" and each.shape[1] == 36
               for each in step.operations)


def test_a_rank_of_very_many_takes_no_longer_to_plan():
    """It is given its part of each parameter, and not those of all: of so many, these would take minutes."""
    few, many = (planned("parallel.strategy=fsdp2", "train.global_batch_size=32768", "train.precision=bf16", gpus=gpus,
                         kind="h100") for gpus in (16384, 32768))
    assert few.memory.at_rest == many.memory.at_rest > 0  # at most one row of each parameter


@pytest.mark.slow
def test_ranks_exchange_what_their_strategy_says():
    weights = 4 * planned("parallel.strategy=single").parameters
    ddp, fsdp2 = (planned(f"parallel.strategy={name}", "train.precision=fp32", gpus=16) for name in ("ddp", "fsdp2"))
    reduced = sum(each.bytes * each.count for each in ddp.exchanges if each.part == "backward")
    assert reduced == weights
    assert {(each.name, each.within_nodes) for each in fsdp2.exchanges if each.part != "optimizer"} == \
        {("all_gather", False), ("reduce_scatter", False)}
    hybrid = planned("parallel.strategy=fsdp2", "parallel.shard_size=8", "train.precision=fp32", gpus=16)
    assert {(each.name, each.ranks, each.within_nodes) for each in hybrid.exchanges if each.part == "backward"} == \
        {("all_gather", 8, True), ("reduce_scatter", 8, True), ("all_reduce", 2, False)}
    assert not dist.is_initialized()


def test_second_copies_are_gathered_inside_a_node():
    """After the first forward of a step, which gathers from all."""
    step = planned("parallel.strategy=zero3", "parallel.shard_size=8", "train.precision=bf16", "train.global_batch_size=32",
                   gpus=16)
    gathers = {(each.part, each.ranks, each.within_nodes) for each in step.exchanges if each.name == "all_gather"}
    assert gathers == {("forward", 16, False), ("backward", 8, True)}  # the second forward stands at the end of a backward


def test_split_sequences_are_exchanged_by_each_layer_and_take_half_the_activations():
    long = "model.heads=4", "model.positions=1024", "data.sequence_length=1024", "parallel.strategy=ddp"
    whole, split = (planned(*long, "train.precision=fp32", f"parallel.context={size}", gpus=4) for size in (1, 2))
    assert (whole.accumulation, split.accumulation) == (4, 8)
    assert held(split, "activations") == pytest.approx(held(whole, "activations") / 2, rel=0.1)  # one exchange beside them
    sent = {(each.part, each.bytes, each.ranks, each.hidden): each.count
            for each in split.exchanges if each.name == "all_to_all"}
    features = 4 * 36 * 1024 // 2  # bytes of a part: queries, keys and values go one way, what is made of them the other
    assert sent == {(part, times * features, 2, False): 3 * 8 for part in ("forward", "backward") for times in (1, 3)}


def test_gradients_that_are_summed_once_a_step_hide_behind_the_last_micro_batch_alone():
    for strategy, name in (("ddp", "all_reduce"), ("fsdp2", "reduce_scatter")):
        step = planned(f"parallel.strategy={strategy}", "train.precision=fp32", gpus=4)
        assert step.accumulation == 4
        for each in step.exchanges:
            assert each.last_only == (each.part == "backward" and each.name == name), each


def test_a_plan_takes_neither_data_nor_tokenizer():
    step = planned("data.source=not/here", kind="h100")
    assert (step.samples, step.tokens, step.accumulation) == (16, 16 * 24, 16)
    open_vocabulary = [each for each in GPT if not each.startswith("model.vocab_size")]
    with pytest.raises(UserError, match="not/here.*set model.vocab_size"):
        plan_step(parse_config(FAMILIES, gpt(like=open_vocabulary)), Machine("cpu", 1, 1))


def test_a_family_that_does_not_say_what_a_sample_is_is_refused():
    line = genscale.make_family("line", network=lambda model: torch.nn.Linear(2, 1), loss=lambda network, batch, draws: 0,
                                data=lambda settings, seed: None)
    with pytest.raises(UserError, match="model.family: line cannot be planned.*blueprint"):
        line.blueprint(replace(parse_config(FAMILIES, gpt()), model=line.model_settings()))
    assert isinstance(line, Family)


def test_a_family_of_ones_own_is_planned_where_it_says_what_a_sample_is(monkeypatch):
    def loss(network, batch, draws):
        return (network(batch["x"]) - draws.normal("target", 1)).square().sum(1)

    family = genscale.make_family(
        "line", network=lambda model: torch.nn.Linear(1000, 1), loss=loss, data=lambda settings, seed: None,
        sample=lambda settings: {"x": torch.empty(1000, device="meta")})
    monkeypatch.setitem(FAMILIES.registered, "line", family)
    config = parse_config(FAMILIES, ["--model.family=line", "--train.global_batch_size=8", "--train.precision=fp32"])
    step = plan_step(config, Machine("cpu", 1, 1))
    assert (step.parameters, held(step, "weights"), held(step, "optimizer state")) == (1001, 4004, 2 * 4004 + 2 * 4)
    assert 2 * 8 * 1000 in {each.flops for each in step.operations if each.kind == "product"}


def test_what_training_refuses_is_refused():
    with pytest.raises(UserError, match="train.global_batch_size: 16 does not divide by 3 processes"):
        planned(gpus=3)


@pytest.mark.slow
def test_seventy_billion_on_a_thousand_gpus_are_planned_on_a_laptop():
    script = ("import json, resource, sys; from pathlib import Path; from genscale.families import FAMILIES; "
              "from genscale.settings.parser import load_config; from genscale.planning.trace import plan_step; "
              "from genscale.planning.account import Machine; "
              "step = plan_step(load_config(FAMILIES, Path('configs/gpt/llama-70b.yaml')), Machine('h100', 1024, 8)); "
              "seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime; "
              # getrusage counts what the process was before it became this one
              "held = int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]); "
              "print(json.dumps([step.parameters, step.memory.peak, held / 2**20, seconds]))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=280)
    parameters, peak, rss, seconds = json.loads(done.stdout.splitlines()[-1])
    assert parameters == 70_553_706_496
    assert 20 * 2**30 < peak < 60 * 2**30
    assert rss < 1
    assert seconds < 60  # half of it on a quiet machine


def test_the_allocator_keeps_what_does_not_fit():
    small, large = [(1, 1000), (1, -1000)], [(2, 12 * MIB), (2, -12 * MIB), (3, 13 * MIB)]
    assert replay(small).reserved == 2 * MIB
    assert replay(large).reserved == 26 * MIB  # 12 were reserved by themselves, and 13 do not fit
    assert replay(large, expandable=True).reserved == 20 * MIB  # the segment is long enough
    assert replay([(1, 100), (2, 513)]).allocated == 512 + 1024
    halves = [(1, 8 * MIB), (2, 8 * MIB), (1, -8 * MIB), (2, -8 * MIB), (3, 16 * MIB)]
    assert replay(halves).reserved == 20 * MIB  # two free neighbours are one


@pytest.mark.slow
def test_every_shipped_config_can_be_planned_by_its_family():
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        config = load_config(FAMILIES, file)
        if file.name in NEEDS_A_RUN:
            continue
        assert FAMILIES[config.model.family].blueprint(config).sample
