"""Who meets whom in peers_cpu.py: the commands of both sides, at the same shape, batch, precision and optimizer."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contestants import Program
from report import ROOT

PEERS = ROOT / "benchmarks" / "peers"
GPT = {"layers": 6, "heads": 6, "width": 384, "time": 256, "batch": 4, "vocab_size": 50304}
SMALL_GPT = {"layers": 4, "heads": 4, "width": 256, "time": 128, "batch": 16, "vocab_size": 320}
NANOGPT = {"layers": 4, "heads": 4, "width": 128, "time": 64, "batch": 12}


@dataclass
class Inputs:
    """Where things are.

    Attributes:
        folder: for what is made on the way.
        threads: of a process, where a case does not say.
        packages: more folders on the peers' PYTHONPATH.
        text: a folder with input.txt, train.txt and val.txt.
        nanogpt: a folder with nanoGPT and its prepared data.
    """

    folder: Path
    threads: int
    packages: list[Path] = field(default_factory=list)

    @property
    def text(self) -> Path:
        return self.folder / "shakespeare"

    @property
    def nanogpt(self) -> Path:
        return self.folder / "nanogpt"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        precision: of ours; theirs is the same, or fp32 where ours is auto.
        unit: a turn has a multiple of so many steps, where steps differ.
        needs: packages of the peer.
        needs_text: tiny Shakespeare and nanoGPT.
    """

    name: str
    peer: str
    ours: Program
    theirs: Program
    precision: str = "fp32"
    unit: int = 1
    needs: tuple[str, ...] = ()
    needs_text: bool = False

    @property
    def threads(self) -> int | None:
        return self.ours.threads

    @property
    def processes(self) -> int:
        return self.ours.processes

    def missing(self) -> str:
        """Why it cannot be made, or nothing."""
        path = [*map(str, self.theirs.packages), *sys.path]
        absent = [name for name in self.needs if importlib.machinery.PathFinder.find_spec(name, path) is None]
        hint = "; see --packages in the head of peers_cpu.py" if "lightning" in absent else ""
        return f"not installed: {', '.join(absent)}{hint}" if absent else ""


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def ours(settings: dict[str, Any], threads: int, *first: str, processes: int = 1) -> Program:
    """`genscale train`; `first`: words before the settings."""
    settings = {"run.dir": "{scratch}/runs", "run.name": "peer", "train.steps": 10**6, "schedule.name": "constant",
                "tracking.wandb": "disabled", **settings}
    several = ["--processes", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "genscale", "train", *several, *first, *flags(settings)]
    return Program(command, ROOT, [ROOT], threads, processes)


def script(inputs: Inputs, name: str, settings: dict[str, Any], threads: int, processes: int = 1) -> Program:
    """A script of peers/, where there are several processes under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(PEERS / f"{name}.py"), *flags(settings)]
    return Program(command, inputs.folder, [inputs.nanogpt, *inputs.packages], threads, processes)


def gpt_settings(inputs: Inputs, shape: dict[str, int], lr: float) -> dict[str, Any]:
    """Ours, of a shape that a script of peers/ takes as its flags."""
    return {"model.family": "gpt", "model.layers": shape["layers"], "model.heads": shape["heads"],
            "model.width": shape["width"], "model.positions": shape["time"], "model.vocab_size": shape["vocab_size"],
            "data.source": inputs.text / "train.txt", "data.validation_source": inputs.text / "val.txt",
            "data.document": "file", "data.sequence_length": shape["time"],
            "train.global_batch_size": shape["batch"], "optimizer.lr": lr, "optimizer.weight_decay": 0.1}


def our_nanogpt_twin(inputs: Inputs, threads: int | None = None, steps: int | None = None,
                     tracking: str = "disabled") -> Program:
    """configs/gpt/shakespeare-char-cpu.yaml with nanoGPT's own learning rate; `steps`: with its schedule, and an evaluation on
    the whole validation text at the end."""
    settings: dict[str, Any] = {"data.source": inputs.text / "train.txt", "data.validation_source": inputs.text / "val.txt",
                                "optimizer.lr": 1e-3}
    if tracking == "default":
        settings["tracking.wandb"] = "offline"
    settings |= {"train.steps": steps, "schedule.name": "cosine", "train.evaluate_every": 0} if steps \
        else {"train.evaluate_every": 0, "schedule.warmup_steps": 0}
    return ours(settings, threads or inputs.threads, "--config", str(ROOT / "configs/gpt/shakespeare-char-cpu.yaml"))


def nanogpt_command(inputs: Inputs, threads: int | None = None, steps: int | None = None) -> Program:
    """The command of nanoGPT's README for a CPU, but that losses are logged as often as ours, and estimated before the first
    step on two batches instead of forty; `steps`: it ends after so many, with a checkpoint."""
    settings: dict[str, Any] = {"device": "cpu", "compile": False, "eval_iters": 1, "log_interval": 10,
                                "block_size": NANOGPT["time"], "batch_size": NANOGPT["batch"], "n_layer": NANOGPT["layers"],
                                "n_head": NANOGPT["heads"], "n_embd": NANOGPT["width"], "dropout": 0.0,
                                "out_dir": "{scratch}/out"}
    settings |= {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps} if steps \
        else {"max_iters": 10**6, "eval_interval": 10**6, "decay_lr": False}
    words = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *words]
    return Program(command, inputs.nanogpt, inputs.packages, threads or inputs.threads)


def cases(inputs: Inputs) -> Iterator[Case]:
    """Every comparison of steps."""
    threads = inputs.threads
    for count in sorted({1, threads}):
        yield Case(f"nanogpt/{count}", "nanoGPT", our_nanogpt_twin(inputs, count), nanogpt_command(inputs, count),
                   needs_text=True)
    text = {"text": inputs.text / "train.txt"}
    for name, precision in (("fp32", "fp32"), ("bf16", "bf16"), ("default", "auto")):
        settings = {**gpt_settings(inputs, GPT, 1e-4), "train.precision": precision}
        theirs = {**text, **GPT, "precision": "bf16" if name == "bf16" else "fp32"}
        yield Case(f"transformers/{name}", "transformers", ours(settings, threads),
                   script(inputs, "transformers_trainer", theirs, threads), precision, needs=("transformers",), needs_text=True)
    settings = {**gpt_settings(inputs, GPT, 1e-4), "train.precision": "fp32"}
    yield Case("lightning/fp32", "lightning", ours(settings, threads),
               script(inputs, "lightning_trainer", {**text, **GPT}, threads), needs=("lightning", "transformers"),
               needs_text=True)
    for batch, precision in ((8, "fp32"), (32, "fp32"), (128, "fp32"), (64, "auto")):
        settings = {"model.family": "dcgan", "model.latent": 100, "model.width": 64, "data.size": 64,
                    "train.global_batch_size": batch, "train.precision": precision, "train.clip": 0, "optimizer.lr": 2e-4,
                    "optimizer.betas": "[0.5,0.999]", "optimizer.weight_decay": 0}
        yield Case(f"dcgan/{batch}/{'default' if precision == 'auto' else precision}", "tutorial", ours(settings, threads),
                   script(inputs, "dcgan_tutorial", {"batch": batch}, threads), precision)
    for precision in ("fp32", "auto"):
        settings = {"model.family": "vae", "model.width": 64, "model.multipliers": "[1,2,4,4]", "model.latents": 64,
                    "model.likelihood": "bernoulli", "data.size": 32, "data.channels": 1, "train.global_batch_size": 64,
                    "train.precision": precision, "train.clip": 1, "optimizer.lr": 5e-4, "optimizer.betas": "[0.9,0.99]",
                    "optimizer.weight_decay": 0}
        yield Case(f"vae/{'default' if precision == 'auto' else precision}", "loop", ours(settings, threads),
                   script(inputs, "vae_loop", {"batch": 64}, threads), precision)
    yield Case("ring", "loop", ours({"train.evaluate_every": 0}, threads, "--config", str(ROOT / "configs/points/ring.yaml")),
               script(inputs, "ring_loop", {}, threads), unit=4)
    for strategy in ("single", "ddp", "fsdp2", "zero2"):
        processes = 1 if strategy == "single" else 2
        settings = {**gpt_settings(inputs, SMALL_GPT, 1e-3), "train.precision": "fp32", "parallel.strategy": strategy}
        yield Case(f"by-hand/{strategy}", "by hand", ours(settings, 1, processes=processes),
                   script(inputs, "gpt_by_hand", {**text, **SMALL_GPT, "strategy": strategy}, 1, processes),
                   needs=("deepspeed",) if strategy == "zero2" else (), needs_text=True)
