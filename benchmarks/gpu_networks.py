"""Small and large networks of every family on made-up batches, stepped by the product's own trainer and engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import genscale  # noqa: F401
from genscale.checkpoint.checkpoints import Checkpoint
from genscale.checkpoint.restoring import load_beside_weights
from genscale.checkpoint.saving import Contents, Saver
from genscale.families.dcgan.objective import NETWORKS, ImageGAN
from genscale.families.dcgan.settings import GANSettings
from genscale.families.gpt.network import GPT, GPTSettings
from genscale.families.gpt.objective import LanguageModel
from genscale.families.vae.network import VAE
from genscale.families.vae.objective import VAEObjective
from genscale.families.vae.objective_settings import VAEObjectiveSettings
from genscale.families.vae.settings import VAESettings
from genscale.hook import StepReport
from genscale.objectives.base import Objective
from genscale.objectives.gan_settings import GANObjectiveSettings
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan, build_engine
from genscale.settings.config import Config, GuardSettings, OptimizerSettings, ParallelSettings, TrainSettings
from genscale.supervise.signals import StopSignal
from genscale.training.optimizers import make_optimizer
from genscale.training.trainer import Trainer

import torch
from torch import Tensor


class NoTokenizer:
    """Tokens are drawn."""

    end_of_text = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token_bytes(self) -> None:
        return None


@dataclass(frozen=True)
class Shape:
    """What a batch is made of.

    Attributes:
        samples: in a micro-batch.
        size: tokens of a text, or pixels of a side.
        vocabulary: tokens there are.
        document: tokens of a document, on average; None: as many as there are in the vocabulary.
        width: of a GPT.
    """

    samples: int = 4
    size: int = 32
    vocabulary: int = 512
    document: int | None = None
    width: int = 256


class DenseGPT(GPT):
    """Takes a dense mask also where FlexAttention would take it in blocks."""

    def _masks_in_blocks(self, tokens: Tensor, dropout_keys: Tensor | None) -> bool:
        return False


def gpt(shape: Shape, separate: bool = False, dense: bool = False, **settings: Any) -> LanguageModel:
    whole = GPTSettings(**{"layers": 2, "heads": 4, "width": shape.width, "positions": shape.size, **settings})
    with torch.device("meta"):
        network = (DenseGPT if dense else GPT)(whole, shape.vocabulary)
    return LanguageModel(network, NoTokenizer(shape.vocabulary), shape.size, separate_documents=separate,
                         weights=lambda name: network.initial_weight(name, 0))


def gan(shape: Shape, architecture: str = "dcgan", norm: str = "batch", objective: dict[str, Any] | None = None,
        **settings: Any) -> ImageGAN:
    model = GANSettings(**{"architecture": architecture, "width": 16, "discriminator_norm": norm, **settings})
    pixels = 3, shape.size, shape.size
    with torch.device("meta"):
        generator, discriminator = (kind(model, pixels) for kind in NETWORKS[architecture])
    return ImageGAN(generator, discriminator, GANObjectiveSettings(**(objective or {})), image_shape=pixels, seed=0,
                    latent=model.latent)


def vae(shape: Shape, objective: dict[str, Any] | None = None, **settings: Any) -> VAEObjective:
    model = VAESettings(**({} if settings.get("architecture") == "mlp" else {"width": 16}) | settings)
    with torch.device("meta"):
        network = VAE(model, shape.size, 3)
    return VAEObjective(network, model, VAEObjectiveSettings(**(objective or {})), (3, shape.size, shape.size), seed=0)


TEXT = Shape(size=128)
RESIDUAL = {"loss": "hinge", "augmentation": ["color", "translation", "cutout"], "r1": 1.0, "regularise_every": 2}
SMALL: dict[str, tuple[Shape, Callable[[Shape], Objective], dict[str, Any]]] = {
    "gpt2": (TEXT, gpt, {}),
    "qwen3, window, documents, dropout": (TEXT, lambda shape: gpt(shape, preset="qwen3", kv_heads=2, window=64, separate=True,
                                                                  dropout=0.1), {"ema": 100.0}),
    # FlexAttention has a backward where it is compiled for a GPU.
    "qwen3, window, documents, compiled": (
        Shape(size=300, document=64), lambda shape: gpt(shape, preset="qwen3", kv_heads=2, window=150, separate=True),
        {"compile": torch.cuda.is_available()}),
    "llama, muon": (TEXT, lambda shape: gpt(shape, preset="llama"), {"optimizer": "muon"}),
    "gpt2, chunked loss": (TEXT, lambda shape: gpt(shape, loss_chunk=100), {}),
    "dcgan": (Shape(), gan, {"ema": 100.0, "clip": 0.0}),
    "residual gan": (Shape(), lambda shape: gan(shape, "residual", "none", RESIDUAL, spectral_norm=True), {"ema": 100.0}),
    "vae, bernoulli": (Shape(), lambda shape: vae(shape, likelihood="bernoulli"), {"ema": 100.0}),
    "vae, gaussian": (Shape(), lambda shape: vae(shape, likelihood="gaussian"), {}),
    "iwae": (Shape(), lambda shape: vae(shape, {"importance_samples": 5, "binarise": "dynamic"}, architecture="mlp",
                                        likelihood="bernoulli"), {}),
}
"""What parity, waits and resumes are looked at with: shape, objective, options of the run."""


class Batches:
    """In the place of a loader: random batches, made before."""

    wait_seconds, batch, retries = 0.0, 0, 0

    def __init__(self, shape: Shape, unit: str, accumulation: int, pinned: bool, made: int = 8) -> None:
        self.accumulation = accumulation
        self._made = [_batch(shape, unit, number, pinned) for number in range(made)]

    def next_batch(self) -> list[dict[str, Tensor]]:
        first = self.batch * self.accumulation
        self.batch += 1
        return [self._made[(first + number) % len(self._made)] for number in range(self.accumulation)]

    def digest(self) -> int:
        return 0


def _batch(shape: Shape, unit: str, number: int, pinned: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    if unit == "tokens":
        name, values = "tokens", torch.randint(shape.vocabulary, (shape.samples, shape.size + 1), generator=generator)
        if shape.document is not None:
            values[torch.rand(values.shape, generator=generator) < 1 / shape.document] = NoTokenizer.end_of_text
    else:
        pixels = shape.samples, 3, shape.size, shape.size
        name, values = "image", torch.randint(256, pixels, generator=generator, dtype=torch.uint8)
    return {name: values.pin_memory() if pinned else values,
            "sample": torch.arange(number * shape.samples, (number + 1) * shape.samples)}


@dataclass
class Run:
    """An objective under an engine, a step at a time.

    Attributes:
        device: other than the one there is: "cpu" on a machine with a GPU.
        checkpoint: where it goes on from.
    """

    objective: Objective
    shape: Shape
    precision: str = "bf16"
    device: str | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    ema: float = 0.0
    compile: bool = False
    recompute: str = "none"
    clip: float = 1.0
    strategy: str = "single"
    accumulation: int = 2
    checkpoint: Checkpoint | None = None
    reports: list[StepReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.processes = Processes(need_group=self.strategy != "single")
        if self.device is not None:
            self.processes.device = torch.device(self.device)
        train = TrainSettings(precision=self.precision, clip=self.clip, ema_half_life=self.ema, steps=10**6,  # type: ignore[arg-type]
                              global_batch_size=self.shape.samples * self.accumulation)
        optimizer = OptimizerSettings(name=self.optimizer, lr=1e-3, weight_decay=self.weight_decay)  # type: ignore[arg-type]
        config = Config(train=train, optimizer=optimizer,
                        guards=GuardSettings(dry_batch=False),
                        parallel=ParallelSettings(compile=self.compile, activation_checkpointing=self.recompute))  # type: ignore[arg-type]
        self.engine = build_engine(ParallelPlan(self.strategy, "none", self.precision, 1), self.processes, config.parallel,
                                   self.precision, self.clip, self.shape.samples, self.accumulation)
        weights = {name: self.objective.initial_weights(name) if self.checkpoint is None
                   else self.checkpoint.tensors("networks", name) for name in self.objective.networks}
        self.engine.prepare(self.objective.networks, lambda module: make_optimizer(module, config.optimizer, self.precision),
                            weights, self.objective.averaged if self.ema else ())
        if self.checkpoint is not None:
            load_beside_weights(self.engine, self.checkpoint)
        self.batches = Batches(self.shape, self.objective.unit, self.accumulation, self.processes.device.type == "cuda")
        self.trainer = Trainer(config, self.objective, self.engine, self.batches, [], lambda: "none")  # type: ignore[arg-type]
        self._stop, self.steps_done = StopSignal(), 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps_done += 1
            self.reports.append(self.trainer.train_step(self.steps_done, self._stop))

    def metrics(self, words: Sequence[str]) -> list[dict[str, float]]:
        """Of every step, those that have one of these words in their names; waits for the device."""
        for report, outcome in self.trainer._unsettled:
            report.metrics.update(self.trainer.metrics_of(outcome))
        self.trainer._unsettled.clear()
        return [{name: value for name, value in report.metrics.items() if any(word in name for word in words)}
                for report in self.reports]

    def state(self) -> list[Tensor]:
        """All that a checkpoint would hold, copied to the host."""
        return [piece.values.detach().cpu().clone() for pieces in self._pieces().values() for piece in pieces]

    def save(self, folder: Path) -> Saver:
        """Begin a checkpoint, which is written while training may go on."""
        saver = Saver(folder, self.processes, keep=3)
        state = {"step": self.steps_done, "data": {}, "scalers": {}, "plan": {}}
        saver.start(self._pieces(), Contents(self.steps_done, state, "", {}, None, False))
        return saver

    def _pieces(self) -> dict[str, Any]:
        engine = self.engine
        return {f"networks/{name}": engine.network_pieces(name) for name in engine.modules} \
            | {f"optimizers/{name}": engine.optimizer_pieces(name) for name in engine.modules} \
            | {f"averages/{name}": engine.average_pieces(name) for name in engine.averages}


def small(name: str, toy: bool = False, **options: Any) -> Run:
    """A run of one of `SMALL`; as a toy, with texts that a CPU computes in bf16 within seconds."""
    shape, build, usual = SMALL[name]
    if toy and shape.size > 64:
        shape = replace(shape, samples=2, size=64, width=64)
    return Run(build(shape), shape, **{**usual, **options})
