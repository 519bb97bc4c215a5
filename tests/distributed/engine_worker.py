"""What a process of an engine test does: trains small networks through Trainer.run_phase; see genscale/testing/workers.py.

What it trains on comes from `token_batch`, `point_batch` and `text_network`, which the tests import to compute the truth.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention

from genscale.errors import UserError
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.families.gpt.objective import LanguageModel
from genscale.objectives.base import Objective
from genscale.parallel import zero
from genscale.parallel.averages import local
from genscale.parallel.dealing import dealt
from genscale.parallel.engine import Engine
from genscale.parallel.pieces import tensor_bytes
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.rng import torch_generator
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings, TrainSettings
from genscale.testing.objectives import NOISE, ToyGAN
from genscale.testing.training import Training
from genscale.testing.workers import serve
from genscale.training.optimizers import make_optimizer

GLOBAL_BATCH, TIME, VOCABULARY = 8, 32, 64
DEFAULTS = {"strategy": "ddp", "task": "text", "steps": 4, "accumulation": 1, "precision": "fp32", "clip": 0.0,
            "offload": "none", "activation_checkpointing": "none", "activation_offload": False, "compile": False,
            "ragged": False, "watch": False, "evaluate": False, "count_operations": False, "meta": False,
            "tied_modules": False, "layers": 2, "width": 32,
            "preset": "gpt2", "shard_size": None, "reduce_gradients": "auto", "reshard_after_forward": True,
            "prefetch_blocks": 0, "weigh_gradients": False, "buckets": 1, "live": zero.LIVE, "window": None, "in_blocks": False,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}


def token_batch(step: int, ragged: bool) -> Tensor:
    """The global batch of a step, `(GLOBAL_BATCH, TIME + 1)`; ragged: sample i has about i * i / 2 valid targets, then -1."""
    # Few of the words occur, so that the first gradients are large (norm 3.6) and there is something to learn.
    tokens = torch.randint(0, 4, (GLOBAL_BATCH, TIME + 1), generator=torch_generator(0, "tokens", step))
    if ragged:
        for index in range(GLOBAL_BATCH):
            tokens[index, 2 + index * index // 2:] = -1
    return tokens


def point_batch(step: int) -> Tensor:
    """Points `(GLOBAL_BATCH, 2)` that the generator is to imitate."""
    return torch.randn(GLOBAL_BATCH, 2, generator=torch_generator(0, "points", step)) + 2.0


class InBlocks(GPT):
    """Takes masks in blocks on the CPU too."""

    def _masks_in_blocks(self, tokens: Tensor, dropout_keys: Tensor | None) -> bool:
        return True


@contextlib.contextmanager
def traced_alone(wanted: bool) -> Iterator[None]:
    """Inside, blocks are compiled into what runs as it is written, FlexAttention's backward on the CPU too."""
    whole, refuses = nn.Module.compile, flex_attention._validate_device
    if wanted:
        nn.Module.compile = functools.partialmethod(whole, backend="aot_eager")
        flex_attention._validate_device = lambda *_tensors: None
    try:
        yield
    finally:
        nn.Module.compile, flex_attention._validate_device = whole, refuses


def text_network(layers: int = 2, width: int = 32, meta: bool = False, tied_modules: bool = False,
                 preset: Literal["gpt2", "llama"] = "gpt2", window: int | None = None, in_blocks: bool = False) -> GPT:
    """With its initial weights, the same in every process; or on the meta device."""
    with torch.device("meta" if meta else "cpu"):
        settings = GPTSettings(preset=preset, layers=layers, heads=2, width=width, positions=TIME, tied=not tied_modules,
                               window=window)
        network = (InBlocks if in_blocks else GPT)(settings, VOCABULARY)
    if tied_modules:  # the same network, its one embedding table held by two modules
        network.output.weight = network.token_embedding.weight
    if not meta:
        network.initialise(0)
    return network


def train_plainly(optimizer: dict[str, Any], steps: int = 4, clip: float = 0.0, **shape: Any) -> tuple[list[float], ...]:
    """Losses and gradient norms of a text's training in plain PyTorch, in this process."""
    network = text_network(**shape)
    made = make_optimizer(network, OptimizerSettings(**optimizer))
    losses, norms = [], []
    for step in range(steps):
        tokens = token_batch(step, ragged=False)
        loss = F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), clip or float("inf")).item())
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    return losses, norms


class NoTokenizer:
    """A language model is trained on tokens as they are here."""

    def token_bytes(self) -> None:
        return None


def micro_batches(variant: dict[str, Any], step: int, processes: Processes) -> list[dict[str, Tensor]]:
    """This process's share of a step: the samples that are its rank modulo the processes, as the loader deals them."""
    whole = {"sample": torch.arange(GLOBAL_BATCH)}
    if variant["task"] == "text":
        whole["tokens"] = token_batch(step, variant["ragged"])
    else:
        whole["x"] = point_batch(step)
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


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    with traced_alone(variant["in_blocks"]):
        return trained(variant, processes, plan)


def trained(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    text = variant["task"] == "text"
    shape = {key: variant[key] for key in ("layers", "width", "meta", "tied_modules", "preset", "window", "in_blocks")}
    objective: Objective = LanguageModel(text_network(**shape), NoTokenizer(), TIME) if text else ToyGAN(width=64)
    train = TrainSettings(global_batch_size=GLOBAL_BATCH, clip=variant["clip"],
                          micro_batch_size=GLOBAL_BATCH // processes.world_size // variant["accumulation"])
    parallel = ParallelSettings(strategy=plan.strategy, offload=plan.offload, compile=variant["compile"],
                                activation_checkpointing=variant["activation_checkpointing"],
                                **{key: variant[key] for key in ("shard_size", "reduce_gradients", "reshard_after_forward",
                                                                 "prefetch_blocks", "activation_offload")})
    config = Config(train=train, optimizer=OptimizerSettings(**variant["optimizer"]), parallel=parallel)
    reads = {"gpt": WatchedReads(objective.networks["gpt"])} if variant["meta"] else None
    zero.BUCKETS["cpu"], zero.LIVE = variant["buckets"], variant["live"]
    training = Training(objective, None, config, processes=processes, plan=plan, weights=reads)
    engine, trainer = training.engine, training.trainer
    began: dict[str, Any] = {}
    if reads:
        refused = [told for error in (UserError("weights.bin: gone"), KeyError("x")) for told in refusals(processes, error)]
        began = {"digest": digest_of(engine.network_state("gpt")), "asked": processes.gather(reads["gpt"].asked),
                 "refused": refused}
    to_come = [each for name in engine.optimizers for each in engine.optimizer_state_to_come(name)]
    foreseen = engine.bytes_at_rest() + tensor_bytes(to_come)
    del to_come
    weighed: list[int] = []
    if variant["weigh_gradients"]:
        weigh_after_backward(engine, weighed)
    steps, leaks = [], []
    names: list[str] = []
    for step in range(variant["steps"]):
        batches, metrics = micro_batches(variant, step, processes), {}
        with torch.autograd.profiler.profile(enabled=variant["count_operations"] and step == 0) as profile:
            for phase in objective.phases:
                watched = [name for name in engine.modules if variant["watch"] and name != phase.network]
                opponents = {name: state_of(engine, name) for name in watched}
                if variant["evaluate"]:  # between phases even, which no trainer does
                    networks = engine.view(None)
                    with torch.no_grad():
                        networks["discriminator"](networks["generator"](torch.ones(2, NOISE)))
                metrics.update(trainer.metrics_of(trainer.run_phase(phase, step, batches)))
                for name, before in opponents.items():
                    after = state_of(engine, name)
                    changed = [key for key in before if not torch.equal(before[key], after[key])]
                    touched = [key for key, p in engine.modules[name].named_parameters() if p.grad is not None]
                    leaks += [f"step {step}, {phase.name}: {name}.{key}" for key in changed + touched]
        if variant["count_operations"] and step == 0:
            names = [event.name for event in profile.function_events]
        steps.append(metrics)
    wrapper = next(iter(engine.networks.values()))
    made = next(iter(engine.optimizers.values()))
    return {"steps": steps, "leaks": leaks, "bytes_at_rest": processes.gather(engine.bytes_at_rest()),
            "began": began, "bytes_foreseen": processes.gather(foreseen),
            "gradient_bytes": processes.gather(weighed), "parameters": sum(p.numel() for p in wrapper.parameters()),
            "bytes_while_filled": processes.gather(reads["gpt"].most_bytes if reads else 0),
            "wrapper": type(wrapper).__name__, "optimizer": type(getattr(made, "optimizer", made)).__name__,
            "stage": wrapper.zero_optimization_stage() if hasattr(wrapper, "zero_optimization_stage") else None,
            "matrix_products": names.count("aten::addmm"), "activations": names.count("aten::gelu"),
            "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "weights": {} if text else {name: state_of(engine, name) for name in engine.modules}}


if __name__ == "__main__":
    serve(answer, DEFAULTS)
