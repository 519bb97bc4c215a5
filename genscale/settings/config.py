"""What a run is: typed sections, read from YAML, overridden from the command line.

Every setting is a dataclass field with a docstring; the command line, `--help` and the YAML are all generated from them
(`genscale.cli`). The `model` and `data` sections belong to the family (`model.family`) and are defined beside its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from genscale.errors import UserError

PLAN: Literal["plan"] = "plan"
"""The `train.micro_batch_size` that is asked of the planner."""
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]


class ModelSettings(Protocol):
    """What every family's `model` section has."""

    @property
    def family(self) -> str: ...


class DataSettings(Protocol):
    """What every family's `data` section has."""

    @property
    def workers(self) -> int: ...

    @property
    def prefetch_steps(self) -> int: ...


Model = TypeVar("Model", bound=ModelSettings)
Data = TypeVar("Data", bound=DataSettings)
Objective = TypeVar("Objective")


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives and how it starts."""

    name: str = "run"
    """Name of the run; its folder is <run.dir>/<run.name>."""
    dir: str = "runs"
    """Folder that holds run folders."""
    seed: NonNegativeInt = 1337
    """Seed of the initial weights, the sample order and every random draw."""
    resume: str = "auto"
    """auto: continue from the run folder's latest valid checkpoint; never: start anew (an earlier run in the folder is
    moved aside); or the path of a checkpoint."""
    trace: bool = False
    """Keep digests of batch, draws, gradients and weights of every step, for `genscale compare` to name where two runs part."""
    deterministic: bool = False
    """Bit for bit the same numbers each time on a GPU too, with kernels that are slower; an operation that has none is an
    error."""


@dataclass(frozen=True)
class TrainSettings:
    """The steps of a run and what happens every so many of them (0 = never)."""

    steps: PositiveInt = 1000
    """Optimizer steps in all."""
    global_batch_size: PositiveInt = 32
    """Samples in one optimizer step, over all processes."""
    micro_batch_size: PositiveInt | Literal["plan"] | None = None
    """Samples in one forward pass on one process (default: global batch / processes). Accumulation is derived:
    global batch = micro-batch x processes x accumulation. plan: the largest that `genscale plan` says surely fits on the GPUs
    that are there."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer state stay in fp32. auto: what `accelerate launch` was
    configured with, else bf16 where the device computes in it, else fp32. fp8 (Hopper GPUs or newer, with torchao):
    matrix products of the blocks in fp8, the rest in bf16; it takes parallel.compile."""
    tf32: bool = False
    """On a GPU: products in fp32, those of an fp32 run and of gradient penalties, round what they multiply to TF32 (ten bits of
    mantissa), which is faster."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it (0 = no clipping)."""
    log_every: PositiveInt = 10
    """Steps between logged metrics."""
    ema_half_life: NonNegativeFloat = 0
    """Samples after which an average of the weights has forgotten half; samples and evaluations are made with the average
    (0 = no average)."""
    ema_ramp_up: ClosedUnitInterval = 0.05
    """The half-life is at most this share of the samples seen so far, so that a young average is not stale (0 = no limit)."""
    collapse: Literal["ignore", "stop", "restore"] = "ignore"
    """When the validation loss of `collapse_patience` evaluations in a row is above `collapse_factor` times the best: stop the
    run, or restore the averaged weights of the best checkpoint and go on."""
    collapse_factor: PositiveFloat = 3.0
    """See `collapse`."""
    collapse_patience: PositiveInt = 2
    """See `collapse`."""
    evaluate_every: NonNegativeInt = 0
    """Steps between evaluations on the validation set (0 = only after the last step)."""
    sample_every: NonNegativeInt = 0
    """Steps between generated samples (0 = only after the last step)."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints (0 = after so many minutes, and after the last step)."""
    checkpoint_minutes: NonNegativeFloat = 30
    """Most minutes between checkpoints, whatever the steps take (0 = no matter)."""
    checkpoint_keep: PositiveInt = 3
    """Latest checkpoints to keep; the best one is kept besides."""
    checkpoint_keep_every: NonNegativeInt = 0
    """Checkpoints of every so many steps are kept for ever (0 = none)."""
    checkpoint_best: str = "loss"
    """Metric of the evaluations whose best value (of losses and distances the lowest) makes a checkpoint the best; a name
    that is none is refused with those that are."""
    profile: NonNegativeInt = 0
    """Steps to trace with torch.profiler on rank 0, after ten steps of warm-up; writes <run folder>/profile/trace.json.gz and
    table.txt (0 = none)."""


def micro_batch_of(train: TrainSettings) -> int | None:
    """`train.micro_batch_size` where it is a number or left out. Raises UserError where the planner is still to be asked."""
    if train.micro_batch_size == PLAN:
        raise UserError("train.micro_batch_size: plan is settled where a run starts or is planned; give a number here")
    return train.micro_batch_size


@dataclass(frozen=True)
class GuardSettings:
    """What becomes of a run when something goes wrong."""

    non_finite: Literal["skip", "rollback", "stop"] = "skip"
    """When a loss or a gradient is NaN or infinite: leave the update out, and roll back after `skips` in a row; go back to the
    latest checkpoint at once, and on from there without the offending batches; or stop."""
    spikes: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    """The same for a loss that stands out from those of the last steps."""
    spike_deviations: PositiveFloat = 6.0
    """A loss so many standard deviations above the mean of the last 128 steps is a spike."""
    skips: NonNegativeInt = 5
    """Updates left out in a row, before the run is rolled back."""
    rollbacks: NonNegativeInt = 2
    """Times a run is rolled back before it is stopped."""
    hang_minutes: NonNegativeFloat = 10.0
    """A run that has made no progress for so long writes what every process is doing to logs/ and ends (0 = it waits)."""
    dry_batch: bool = True
    """Run every phase once before the first step, without a trace: what does not fit in memory is found at once."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer of every network."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """adamw (Loshchilov and Hutter 2019), muon (Jordan et al. 2024) for the matrices of hidden layers with adamw for the
    rest, or sgd (with momentum)."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate (muon's updates are scaled to the size of adamw's, so that one rate serves both)."""
    lr_of: dict[str, PositiveFloat] = field(default_factory=dict)
    """Peak learning rate of single networks by name, as {discriminator: 4e-4}; the others have `lr`."""
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.95)
    """AdamW: decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings; vectors (norms, biases) are not decayed. sgd: L2 penalty of
    the same."""
    momentum: ClosedUnitInterval = 0.0
    """SGD: momentum."""
    muon_momentum: ClosedUnitInterval = 0.95
    """Muon: momentum of the hidden matrices, in Nesterov's form."""


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning rate over the steps, as a share of optimizer.lr."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up: cosine or linear down to the final share, constant, or wsd (warm-up, stable, decay)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    final_share: ClosedUnitInterval = 0.1
    """Share of the peak learning rate at the last step (cosine, linear, wsd)."""
    decay_share: ClosedUnitInterval = 0.2
    """wsd: share of all steps spent in the final linear decay."""


@dataclass(frozen=True)
class ParallelSettings:
    """How a step is spread over processes and memory."""

    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "auto"
    """auto: what `accelerate launch` was configured with, else ddp for several processes and single for one."""
    shard_size: PositiveInt | None = None
    """fsdp2: shard over groups of so many processes and replicate between the groups (hybrid sharding): 8 on nodes of 8 GPUs
    keeps the gathering of weights inside each node (default: shard over all processes). zero3: all stays sharded over all
    processes, and of the weights each group keeps a second copy between them (ZeRO++'s hpZ), in the precision they compute in,
    from when they were gathered to the next update: what is gathered again meanwhile, is inside the group."""
    reduce_gradients: Literal["auto", "every_micro_batch", "last_micro_batch"] = "auto"
    """fsdp2 with accumulation: sum gradients over the processes after every micro-batch, so that each holds its shard alone, or
    after the last one, where each holds the whole network's in fp32 meanwhile and less is sent. auto: after the last one where
    the whole takes at most 1 GiB."""
    reshard_after_forward: bool = True
    """fsdp2: give the gathered weights of a block back after its forward, and gather them once more for its backward; false:
    keep them until then, which sends a third less and holds the whole network in the precision it computes in."""
    prefetch_blocks: NonNegativeInt = 0
    """fsdp2: blocks whose weights are being gathered while the one before them computes (0: as PyTorch does by itself, one
    ahead in backward)."""
    context: PositiveInt = 1
    """gpt, for sequences of 32k tokens and more: so many neighbouring processes read the same samples, and each computes its
    part of every sequence; in attention, its part of the heads over all of it (DeepSpeed-Ulysses, Jacobs et al. 2023)."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: ZeRO keeps the optimizer state in host memory."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in backward to save memory: full (each block) or selective (all but matrix products and
    attention)."""
    activation_offload: bool = False
    """With activation_checkpointing full: what each block was given waits in host memory until backward, for long sequences, of
    which that fills a GPU."""
    compile: bool = False
    """torch.compile, one block at a time. On a GPU a GPT's separate documents and window then go to FlexAttention instead of a
    dense mask."""


@dataclass(frozen=True)
class TrackingSettings:
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["online", "offline", "disabled"] = "offline"
    """Weights & Biases; offline, it lies in the run folder until `genscale sync` uploads it."""
    project: str = "genscale"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases user or team (default: the account's own)."""
    tensorboard: bool = False
    """Also write TensorBoard event files to <run folder>/tensorboard."""


@dataclass(frozen=True)
class Config(Generic[Model, Data, Objective]):
    """A whole run. `model`, `data` and `objective` hold the family's own settings dataclasses: that of a VAE is a
    `Config[VAESettings, ImageDataSettings, VAEObjectiveSettings]`, and a `Config` is that of any family.

    A config does not change: `dataclasses.replace` makes one that differs.
    """

    run: RunSettings = field(default_factory=RunSettings)
    model: Model = None  # type: ignore[assignment]
    data: Data = None  # type: ignore[assignment]
    objective: Objective = None  # type: ignore[assignment]
    train: TrainSettings = field(default_factory=TrainSettings)
    guards: GuardSettings = field(default_factory=GuardSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    hooks: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: str | Path, settings: Mapping[str, Any] | None = None) -> Config:
        """Read a run's YAML file, with other settings by dotted key: `Config.from_yaml("run.yaml", {"train.steps": 9})`.

        Raises:
            UserError: a mistake in the file or the settings, in one line, as on the command line.
        """
        read: Config = import_module("genscale.api").read_config(path, settings)  # by name, for families stand above
        return read


MAY_CHANGE_AT_RESUME = ("run.", "parallel.", "tracking.", "train.log_every", "train.evaluate_every", "train.sample_every",
                        "train.checkpoint_", "train.micro_batch_size", "train.steps", "train.profile", "train.collapse",
                        "guards.", "hooks.", "data.workers", "data.prefetch_steps", "data.cache", "data.retry_minutes",
                        "data.bad_share", "data.max_record_bytes", "data.max_array_bytes", "model.loss_chunk")
"""Key prefixes that do not change what is computed (`train.steps` may grow or shrink; the schedule then follows the
new value; `train.collapse` decides about the evaluations to come)."""
# run.seed changes what is computed although it stands under "run.".
MUST_NOT_CHANGE_AT_RESUME = ("run.seed",)
