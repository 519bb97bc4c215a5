"""What a process of an engine test with image networks does; see genscale/testing/workers.py.

Trains a small GAN of the real layers through Trainer.run_phase. The networks stand on the meta device and are filled tensor by
tensor, as in a run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genscale.families.dcgan.networks import DCGANDiscriminator, DCGANGenerator
from genscale.families.dcgan.settings import GANSettings
from genscale.models.image_layers import InitialWeights
from genscale.objectives.base import Batch, Networks, Phase, Terms
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.rng import Draws, torch_generator
from genscale.settings.config import Config, OptimizerSettings, ParallelSettings, TrainSettings
from genscale.testing.objectives import BareObjective
from genscale.testing.training import State, Training, same
from genscale.testing.workers import serve

GLOBAL_BATCH, LATENT, SHAPE = 8, 8, (1, 16, 16)
OPTIMIZER = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}
HALF_LIFE = 20.0
BACKEND, WHOLE_COMPILE, WHOLE_MODULE_COMPILE = "aot_eager_decomp_partition", torch.compile, nn.Module.compile
DEFAULTS = {"strategy": "ddp", "precision": "fp32", "steps": 4, "accumulation": 1, "activation_checkpointing": "none",
            "compile": False, "resume_at": 0, "shard_size": None, "optimizer": OPTIMIZER}
KINDS = {
    "batchnorm": ({"width": 4}, ["discriminator", "generator"]),
    "spectral": ({"width": 64, "spectral_norm": True, "discriminator_norm": "none", "generator_norm": "group"},
                 ["discriminator", "generator"]),
    "wasserstein": ({"width": 4, "discriminator_norm": "none", "generator_norm": "group"}, ["critic", "generator"]),
    "lazy": ({"width": 4, "spectral_norm": True, "discriminator_norm": "none", "generator_norm": "group"},
             ["discriminator", "r1", "generator"]),
}  # fmt: skip


def images(step: int) -> Tensor:
    """The global batch of a step, `(GLOBAL_BATCH, *SHAPE)`: noise smooth enough to be learned from."""
    coarse = torch.randn(GLOBAL_BATCH, SHAPE[0], 4, 4, generator=torch_generator(0, "images", step))
    return nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear").tanh()


def networks_of(kind: str, device: str = "cpu") -> tuple[dict[str, nn.Module], dict[str, Callable[[str], Tensor]]]:
    """The networks, without values, and what gives their initial values."""
    settings = GANSettings(latent=LATENT, **KINDS[kind][0])
    with torch.device(device):
        networks = {"generator": DCGANGenerator(settings, SHAPE), "discriminator": DCGANDiscriminator(settings, SHAPE)}
    # A deviation above DCGAN's 0.02, for small networks do not learn in four steps from that.
    return networks, {name: InitialWeights(network, 0, 0.1) for name, network in networks.items()}


class SmallGAN(BareObjective):
    """Phases of every kind that a GAN has."""

    averaged = ("generator",)

    def __init__(self, kind: str) -> None:
        networks, self.reads = networks_of(kind, "meta")
        phases = {"discriminator": Phase("discriminator", "discriminator", self.discriminate, self.count),
                  "critic": Phase("critic", "discriminator", self.criticise, self.count, second_order=True,
                                  statistics=frozenset(["slope"])),
                  "r1": Phase("r1", "discriminator", self.r1, self.count, every=2, second_order=True),
                  "generator": Phase("generator", "generator", self.generate, self.count)}
        super().__init__(networks, [phases[name] for name in KINDS[kind][1]])

    def discriminate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        # Two forwards before the backward, and the generator not detached: both must be harmless.
        fake = networks["discriminator"](networks["generator"](draws.normal("noise", LATENT)))
        real = networks["discriminator"](batch["image"])
        return {"real": nn.functional.softplus(-real.float()).sum(), "fake": nn.functional.softplus(fake.float()).sum()}

    def criticise(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        critic, real = networks["discriminator"], batch["image"]
        fake = networks["generator"](draws.normal("noise", LATENT)).detach()
        share = draws.uniform("share", 1, 1, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        slope = gradient.flatten(1).norm(dim=1)
        return {"critic": (critic(fake) - critic(real)).sum(), "penalty": 10 * (slope - 1).square().sum(),
                "slope": slope.detach().sum()}

    def r1(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        real = batch["image"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(networks["discriminator"](real).sum(), real, create_graph=True)
        return {"penalty": 5 * gradient.square().sum()}

    def generate(self, networks: Networks, batch: Batch, draws: Draws) -> Terms:
        logits = networks["discriminator"](networks["generator"](draws.normal("noise", LATENT)))
        return {"loss": nn.functional.softplus(-logits.float()).sum()}

    def initial_weights(self, name: str) -> Callable[[str], Tensor]:
        return self.reads[name]


def latents() -> Tensor:
    """What the averaged generator is asked for."""
    return torch.randn(4, LATENT, generator=torch_generator(0, "latents"))


class ImageTraining(Training):
    """From initial weights, or from what another one had come to."""

    def __init__(self, variant: dict[str, Any], processes: Processes, plan: ParallelPlan, resume: State | None = None) -> None:
        train = TrainSettings(global_batch_size=GLOBAL_BATCH, ema_half_life=HALF_LIFE, steps=variant["steps"], clip=0.0,
                              micro_batch_size=GLOBAL_BATCH // processes.world_size // variant["accumulation"])
        parallel = ParallelSettings(strategy=plan.strategy, activation_checkpointing=variant["activation_checkpointing"],
                                    compile=variant["compile"], shard_size=variant["shard_size"])
        config = Config(optimizer=OptimizerSettings(**variant["optimizer"]), train=train, parallel=parallel)
        super().__init__(SmallGAN(variant["kind"]), None, config, processes=processes, plan=plan,
                         resume=(resume, None) if resume else None)
        self.variant = variant

    def steps(self, first: int, last: int) -> list[dict[str, float]]:
        lines = []
        for step in range(first, last + 1):
            metrics: dict[str, float] = {}
            for phase in self.objective.phases:
                if step % phase.every == 0:
                    outcome = self.trainer.run_phase(phase, step, self.micro_batches(step))
                    metrics.update(self.trainer.metrics_of(outcome))
            self.trainer.update_averages(step)
            lines.append(metrics)
        return lines

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        rank, world = self.processes.rank, self.processes.world_size
        samples, batch = torch.arange(GLOBAL_BATCH)[rank::world], images(step)[rank::world]
        parts = self.variant["accumulation"]
        return [{"sample": s, "image": i} for s, i in zip(samples.chunk(parts), batch.chunk(parts), strict=True)]

    def made_with_average(self) -> Tensor:
        generator = self.engine.view(None)["generator"].eval()
        with self.engine.averaged(), torch.no_grad():
            made = generator(latents()).float()
        generator.train()
        return made

    def takes_back(self, saved: State) -> bool:
        """Whether the networks have the saved weights again, in their states and in what the generator makes."""
        for name, state in saved["networks"].items():
            self.engine.load_network_state(name, state.__getitem__)
        plain = networks_of(self.variant["kind"])[0]["generator"].eval()
        plain.load_state_dict(saved["networks"]["generator"])
        generator = self.engine.view(None)["generator"].eval()
        with torch.no_grad():
            alike = torch.allclose(generator(latents()).float(), plain(latents()), rtol=1e-2, atol=3e-2)
        return alike and same(self.state()["networks"], saved["networks"])


def compile_without_code() -> None:
    """From here on torch.compile traces and differentiates, and runs what it has traced as it is: no C++ is made of it."""
    torch.compile = functools.partial(WHOLE_COMPILE, backend=BACKEND)
    nn.Module.compile = functools.partialmethod(WHOLE_MODULE_COMPILE, backend=BACKEND)


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> dict[str, Any]:
    if variant["compile"]:
        compile_without_code()
    training = ImageTraining(variant, processes, plan)
    saved_at, steps = variant["resume_at"] or variant["steps"], variant["steps"]
    lines = training.steps(1, saved_at)
    middle = training.state()
    made = training.made_with_average()
    result = {"untouched": same(middle, training.state())}
    if saved_at < steps:
        resumed = ImageTraining(variant, processes, plan, middle)
        loaded = same(middle, resumed.state())
        lines += training.steps(saved_at + 1, steps)
        resumed.steps(saved_at + 1, steps)
        made = training.made_with_average()
        result["resumed_alike"] = loaded and same(training.state(), resumed.state())
    final = training.state()
    buffers = {str(b.dtype) for module in training.engine.modules.values() for b in module.buffers()}
    result["taken_back"] = training.takes_back(middle)
    return {**result, **final, "steps": lines, "made": made, "buffer_dtypes": sorted(buffers),
            "bytes_at_rest": processes.gather(training.engine.bytes_at_rest()),
            "average_bytes": processes.gather(sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes
                                                  for average in training.engine.averages.values() for t in average.held()))}


if __name__ == "__main__":
    serve(answer, DEFAULTS)
