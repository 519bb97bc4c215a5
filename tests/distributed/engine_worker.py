"""One process of an engine test, started by torchrun: trains small networks through Trainer.run_phase and reports as JSON.

    python -m torch.distributed.run --nproc_per_node 2 engine_worker.py '{"name": {"strategy": "zero2", ...}}' results.json

What it trains on comes from `token_batch`, `two_network_batch` and `networks_of`, which the tests import to compute the truth.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.families.gpt.objective import LanguageModel
from genscale.objectives.base import Batch, Networks, Objective, Phase, Terms
from genscale.parallel.averages import local
from genscale.parallel.dealing import dealt
from genscale.parallel.engine import Engine, Read
from genscale.parallel.exit_together import run_and_leave
from genscale.parallel.launch_request import clear_launch_environment
from genscale.parallel.pieces import tensor_bytes
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.rng import Draws, torch_generator
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings
from genscale.training.optimizers import make_optimizer
from genscale.training.trainer import Trainer

GLOBAL_BATCH, TIME, VOCABULARY = 8, 32, 64
DEFAULTS = {"strategy": "ddp", "task": "text", "steps": 4, "accumulation": 1, "precision": "fp32", "clip": 0.0,
            "offload": "none", "activation_checkpointing": "none", "compile": False, "ragged": False, "watch": False,
            "evaluate": False, "count_operations": False, "meta": False, "tied_modules": False, "layers": 2, "width": 32,
            "shard_size": None, "reduce_gradients": "auto", "reshard_after_forward": True, "prefetch_blocks": 0,
            "weigh_gradients": False,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}


def token_batch(step: int, ragged: bool) -> Tensor:
    """The global batch of a step, `(GLOBAL_BATCH, TIME + 1)`; ragged: sample i has about i * i / 2 valid targets, then -1."""
    # Few of the words occur, so that the first gradients are large (norm 3.6) and there is something to learn.
    tokens = torch.randint(0, 4, (GLOBAL_BATCH, TIME + 1), generator=torch_generator(0, "tokens", step))
    if ragged:
        for index in range(GLOBAL_BATCH):
            tokens[index, 2 + index * index // 2:] = -1
    return tokens


def two_network_batch(step: int) -> Tensor:
    """Points `(GLOBAL_BATCH, 2)` that the generator is to imitate."""
    return torch.randn(GLOBAL_BATCH, 2, generator=torch_generator(0, "points", step)) + 2.0


def networks_of(task: str, layers: int = 2, width: int = 32, meta: bool = False,
                tied_modules: bool = False) -> dict[str, nn.Module]:
    """The networks with their initial weights, the same in every process; or a text's on the meta device."""
    if task == "text":
        with torch.device("meta" if meta else "cpu"):
            network = GPT(GPTSettings(layers=layers, heads=2, width=width, positions=TIME, tied=not tied_modules), VOCABULARY)
        if tied_modules:  # the same network, its one embedding table held by two modules
            network.output.weight = network.token_embedding.weight
        if not meta:
            network.initialise(0)
        return {"gpt": network}
    torch.manual_seed(0)
    return {"generator": nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)),
            "discriminator": nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))}


class NoTokenizer:
    """A language model is trained on tokens as they are here."""

    def token_bytes(self) -> None:
        return None


class TwoNetworks(Objective):
    """A non-saturating GAN on points: the least that has an opponent."""

    def __init__(self) -> None:
        self.networks = networks_of("points")
        self.phases = [Phase("discriminator", "discriminator", self.discriminate, self.count),
                       Phase("generator", "generator", self.generate, self.count)]

    def count(self, batch: Batch) -> int:
        return len(batch["points"])

    def discriminate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        # Not detached on purpose: that no gradient reaches the generator is the trainer's promise, not the objective's.
        made = networks["generator"](draws.normal("noise", 4))
        logits = networks["discriminator"](torch.cat([batch["points"], made]))
        real, fake = logits.float().chunk(2)
        return {"loss": nn.functional.softplus(-real).sum() + nn.functional.softplus(fake).sum()}

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        logits = networks["discriminator"](networks["generator"](draws.normal("noise", 4)))
        return {"loss": nn.functional.softplus(-logits.float()).sum()}

    def initial_weights(self, name: str) -> Read:
        raise NotImplementedError

    def evaluate(self, networks: Networks, batch: Batch) -> Terms:
        raise NotImplementedError

    def summarise(self, totals: Any) -> dict[str, float]:
        raise NotImplementedError

    def preview(self, networks: Networks, seed: int, device: torch.device) -> str:
        raise NotImplementedError


def micro_batches(variant: dict[str, Any], step: int, processes: Processes) -> list[dict[str, Tensor]]:
    """This process's share of a step: the samples that are its rank modulo the processes, as the loader deals them."""
    whole = {"sample": torch.arange(GLOBAL_BATCH)}
    if variant["task"] == "text":
        whole["tokens"] = token_batch(step, variant["ragged"])
    else:
        whole["points"] = two_network_batch(step)
    mine = {key: value[processes.rank::processes.world_size].chunk(variant["accumulation"]) for key, value in whole.items()}
    return [dict(zip(mine, parts, strict=True)) for parts in zip(*mine.values(), strict=True)]


def state_of(engine: Engine, name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in engine.network_state(name)}


class WatchedReads:
    """Reads initial weights, and notes the most bytes of the network's tensors that this process held at any read."""

    def __init__(self, network: GPT) -> None:
        self.network, self.most_bytes = network, 0
        self.asked: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.asked.append(name)
        held = [getattr(p, "ds_tensor", p) for p in self.network.parameters()]
        self.most_bytes = max(self.most_bytes, tensor_bytes([tensor for tensor in held if not tensor.is_meta]))
        return self.network.initial_weight(name, 0)


def digest_of(state: Iterator[tuple[str, Tensor]]) -> str:
    """Of names and bits."""
    digest = hashlib.sha256()
    for name, tensor in state:
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def refusals(processes: Processes, error: Exception) -> list[str]:
    """What every process is told where the last one cannot read its tensors."""
    def read(name: str) -> Tensor:
        if processes.rank == processes.world_size - 1:
            raise error
        return torch.zeros(4)

    try:
        return processes.gather(f"{dealt(read, dict.fromkeys('abcd', (4,)), processes)('a').sum()}")
    except Exception as told:
        return processes.gather(f"{type(told).__name__}: {told}")


def live_tensors() -> list[Tensor]:
    """All that Python knows of in this process, and their gradients; by type, for some other objects warn when asked."""
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and not each.is_meta]
    return [local(tensor) for each in found for tensor in (each, each.grad if each.is_leaf else None) if tensor is not None]


def weigh_after_backward(engine: Engine, weighed: list[int]) -> None:
    """After every micro-batch's backward, note the bytes of all tensors that this process holds beyond those of now."""
    micro_batch, before = engine.micro_batch, {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}

    @contextlib.contextmanager
    def watched(name: str, last: bool) -> Iterator[None]:
        with micro_batch(name, last):
            yield
        weighed.append(tensor_bytes(each for each in live_tensors() if each.untyped_storage().data_ptr() not in before))

    engine.micro_batch = watched


def run_variant(variant: dict[str, Any], processes: Processes, plan: Any) -> dict[str, Any]:
    config = Config(optimizer=OptimizerSettings(**variant["optimizer"]))
    settings = ParallelSettings(strategy=plan.strategy, offload=plan.offload, compile=variant["compile"],
                                activation_checkpointing=variant["activation_checkpointing"],
                                **{key: variant[key] for key in ("shard_size", "reduce_gradients", "reshard_after_forward",
                                                                 "prefetch_blocks")})
    shape = {key: variant[key] for key in ("layers", "width", "meta", "tied_modules")}
    objective: Objective = LanguageModel(networks_of("text", **shape)["gpt"], NoTokenizer(), TIME) \
        if variant["task"] == "text" else TwoNetworks()
    micro = GLOBAL_BATCH // processes.world_size // variant["accumulation"]
    engine = build_engine(plan, processes, settings, variant["precision"], variant["clip"], micro, variant["accumulation"])
    reads = WatchedReads(objective.networks["gpt"]) if variant["meta"] else None
    engine.prepare(objective.networks, lambda module: make_optimizer(module, config.optimizer, variant["precision"]),
                   {"gpt": reads} if reads else None)
    began: dict[str, Any] = {}
    if reads:
        refused = [told for error in (UserError("weights.bin: gone"), KeyError("x")) for told in refusals(processes, error)]
        began = {"digest": digest_of(engine.network_state("gpt")), "asked": processes.gather(reads.asked), "refused": refused}
    trainer = Trainer(config, objective, engine, loader=None, hooks=[], last_good=lambda: "none")
    to_come = [each for name in engine.optimizers for each in engine.optimizer_state_to_come(name)]
    foreseen = engine.bytes_at_rest() + tensor_bytes(to_come)
    del to_come
    weighed: list[int] = []
    if variant["weigh_gradients"]:
        weigh_after_backward(engine, weighed)
    steps, leaks = [], []
    with torch.autograd.profiler.profile(enabled=variant["count_operations"]) as profile:
        for step in range(variant["steps"]):
            batches, metrics = micro_batches(variant, step, processes), {}
            for phase in objective.phases:
                watched = [name for name in engine.modules if variant["watch"] and name != phase.network]
                opponents = {name: state_of(engine, name) for name in watched}
                if variant["evaluate"]:  # between phases even, which no trainer does
                    networks = engine.view(None)
                    with torch.no_grad():
                        networks["discriminator"](networks["generator"](torch.ones(2, 4)))
                metrics.update(trainer.metrics_of(trainer.run_phase(phase, step, batches)))
                for name, before in opponents.items():
                    after = state_of(engine, name)
                    changed = [key for key in before if not torch.equal(before[key], after[key])]
                    touched = [key for key, p in engine.modules[name].named_parameters() if p.grad is not None]
                    leaks += [f"step {step}, {phase.name}: {name}.{key}" for key in changed + touched]
            steps.append(metrics)
    names = [event.name for event in profile.function_events] if variant["count_operations"] else []
    wrapper = next(iter(engine.networks.values()))
    made = next(iter(engine.optimizers.values()))
    return {"steps": steps, "leaks": leaks, "bytes_at_rest": processes.gather(engine.bytes_at_rest()),
            "began": began, "bytes_foreseen": processes.gather(foreseen),
            "gradient_bytes": processes.gather(weighed), "parameters": sum(p.numel() for p in wrapper.parameters()),
            "bytes_while_filled": processes.gather(reads.most_bytes if reads else 0),
            "wrapper": type(wrapper).__name__, "optimizer": type(getattr(made, "optimizer", made)).__name__,
            "stage": wrapper.zero_optimization_stage() if hasattr(wrapper, "zero_optimization_stage") else None,
            "matrix_products": names.count("aten::addmm"), "activations": names.count("aten::gelu"),
            "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "weights": {name: {key: value.tolist() for key, value in state_of(engine, name).items()} for name in engine.modules}
            if variant["task"] == "points" else {}}


def main(variants: dict[str, dict[str, Any]], out: Path) -> None:
    # As `genscale train` does: the launcher is asked first, then its variables are removed, then the group is made.
    variants = {name: {**DEFAULTS, **variant} for name, variant in variants.items()}
    plans = {name: plan_parallel(ParallelSettings(strategy=it["strategy"], offload=it["offload"]), it["precision"],
                                 it["optimizer"]["name"]) for name, it in variants.items()}
    clear_launch_environment()
    processes = Processes(need_group=True)
    results = {name: run_variant(variant, processes, plans[name]) for name, variant in variants.items()}
    if processes.is_main:
        out.write_text(json.dumps(results))
    processes.close()


if __name__ == "__main__":
    run_and_leave(lambda: main(json.loads(sys.argv[1]), Path(sys.argv[2])))
