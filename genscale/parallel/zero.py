"""zero1, zero2, zero3: DeepSpeed ZeRO (Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion
parameter models"); with `parallel.shard_size`, ZeRO-3 in a hierarchy (hpZ of Wang et al. 2023, "ZeRO++: extremely efficient
collective communication for giant model training"): weights that were gathered once leave a second copy, shared by neighbours
alone, which all gather from until the next update.

DeepSpeed is started directly, one engine a network, not through Accelerate's plugin: that plugin is one a process, turns into
plain DDP on the CPU without a word, and rewrites the clipping and the optimizer. What DeepSpeed made is checked
after it is made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from genscale.models.memory_format import set_memory_format
from genscale.parallel.averages import Average
from genscale.parallel.engine import LeaveOut, MakeOptimizer, StepResult, never
from genscale.parallel.generating import cast_inputs, without_hooks
from genscale.parallel.materialise import Read, check_fillable, fill, fill_tensor, materialise, named_state, on_meta, put
from genscale.parallel.pieces import Piece, tensor_bytes
from genscale.parallel.precision import DTYPES
from genscale.parallel.torch_optimizers import moments, state_tensors
from genscale.parallel.zero_average import FlatAverage
from genscale.parallel.zero_judging import judging
from genscale.parallel.zero_state import ZeroState
from genscale.settings.config import ParallelSettings


def import_deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, told which device to use and kept from compiling anything at start."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at the first import; without it DeepSpeed guesses
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one process without a launcher
    import deepspeed
    import deepspeed.ops

    # On the CPU DeepSpeed would compile a shared-memory all-reduce that training never calls. It takes a minute and a C++
    # compiler, and a build killed half-way leaves a lock on which every later start hangs for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


LARGEST_BUCKET = 500_000_000
"""Elements that DeepSpeed sends at once by default; it allocates as many, however small the model is."""
BUCKETS = {"cuda": 8}
"""Parts that the gradients of a model are sent in, by kind of device: each while the next is computed. One where none is named:
a CPU has nothing to overlap, and sums of three processes differ in their last bit by where in a bucket a number stands."""

LIVE = 1_000_000_000
"""Elements of gathered weights that stage 3 keeps from one use to the next: a smaller network's from forward to backward."""

PERSISTENT = 10_000
"""Elements of a tensor that stage 3 keeps whole from step to step."""


def neighbours(settings: ParallelSettings, world_size: int) -> dist.ProcessGroup | None:
    """Those that share a second copy of the weights: next to each other by rank, and so on one machine. Collective."""
    if settings.shard_size is None or settings.shard_size == world_size:
        return None
    return dist.new_subgroups(settings.shard_size)[0]


def communication(module: nn.Module, stage: int, device: str) -> dict[str, Any]:
    """DeepSpeed's settings of what is sent at once, for a model of this size. A bucket holds the largest parameter."""
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()]
    parts = BUCKETS.get(device, 1)
    size = min(max([1, *sizes, -(-sum(sizes) // parts)]), LARGEST_BUCKET)
    size += size % 2  # which DeepSpeed asks of it
    found: dict[str, Any] = {"reduce_bucket_size": size, "allgather_bucket_size": size}
    return found if stage == 3 else {**found, "overlap_comm": parts > 1}  # stage 3 does by itself


class ZeroEngine(ZeroState):
    """DeepSpeed ZeRO stage 1 (optimizer state sharded), 2 (and gradients) or 3 (and weights)."""

    def __init__(self, stage: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage, self.whole_weights = stage, stage < 3

    @property
    def strategy(self) -> str:
        return f"zero{self.stage}"

    def configuration(self, module: nn.Module) -> dict[str, Any]:
        """The DeepSpeed configuration, every number given: DeepSpeed's and Accelerate's defaults are not ours."""
        zero: dict[str, Any] = {"stage": self.stage, **communication(module, self.stage, self.processes.device.type)}
        if self.settings.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.processes.device.type == "cuda"}
        if self.stage == 3:
            # Small tensors are kept whole; 0 elements of prefetch on the CPU would only copy.
            zero["stage3_param_persistence_threshold"] = PERSISTENT
            # DeepSpeed's own linear adds the bias in place, onto the product that selective checkpointing keeps.
            zero["memory_efficient_linear"] = not self._selective()
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = LIVE
            if self._neighbours is not None:
                zero["zero_hpz_partition_size"] = self.settings.shard_size
        configuration: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # DeepSpeed would replace our optimizer by its own CPU Adam, or by L2 Adam for SGD.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self.precision == "bf16":
            configuration["bf16"] = {"enabled": True}
            configuration["data_types"] = {"grad_accum_dtype": "fp32"}
            configuration["communication_data_type"] = "fp32"
        return configuration

    @cached_property
    def _neighbours(self) -> dist.ProcessGroup | None:
        return neighbours(self.settings, self.processes.world_size)

    @contextlib.contextmanager
    def _among_neighbours(self) -> Iterator[None]:
        """Inside, DeepSpeed takes this engine's group of neighbours for its own. It has one a process, refuses to make another,
        and would give what an earlier run left to one that has none."""
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = self._neighbours
        try:
            yield
        finally:
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    def _selective(self) -> bool:
        return self.settings.activation_checkpointing == "selective"

    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        deepspeed = import_deepspeed(self.processes.device)
        self._materialise(module, read)
        self.modules[name] = module
        optimizer = make_optimizer(module)
        with self._among_neighbours():
            engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=self.configuration(module))
        self._check(engine, optimizer)
        if self._neighbours is not None:
            engine.optimizer.invalidate_secondary_tensor()  # of before the first forward: none rests between steps
        self.networks[name] = engine
        self.optimizers[name] = engine.optimizer

    def _hold(self, name: str, module: nn.Module, read: Read | None) -> None:
        deepspeed = import_deepspeed(self.processes.device)
        self._materialise(module, read)
        self.modules[name] = self.networks[name] = module
        if self.stage < 3:
            for parameter in module.parameters():
                parameter.data = parameter.data.to(DTYPES[self.precision])
        else:
            configuration = self.configuration(module)
            configuration["zero_optimization"].pop("offload_optimizer", None)
            # Kept, though only the module is called: with the engine would go the hooks that gather.
            with self._among_neighbours():
                self.networks[name], _, _, _ = deepspeed.initialize(model=module, config=configuration)

    def _materialise(self, module: nn.Module, read: Read | None) -> None:
        if self.stage == 3 and self._selective():
            _use_own_linear()
        set_memory_format(module, torch.contiguous_format)  # as its part of a flat partition will be
        if self.stage == 3 and on_meta(module):
            self._materialise_in_partitions(module, read)
        else:
            materialise(module, self.processes.device)
            if read is not None:
                fill(module, read)
        if self.precision != "fp32":
            module.register_forward_pre_hook(cast_inputs(self.precision), with_kwargs=True)  # FSDP2 does so by itself

    @contextlib.contextmanager
    def _gathered(self, name: str) -> Iterator[None]:
        import deepspeed

        absent = [parameter for parameter in self.modules[name].parameters() if not parameter.numel()]
        with deepspeed.zero.GatheredParameters(absent), without_hooks(self.modules[name], "deepspeed"):
            yield

    def _materialise_in_partitions(self, module: nn.Module, read: Read | None) -> None:
        """Give the tensors of one leaf module after another memory and values, and partition them before the next."""
        import deepspeed

        check_fillable(module)
        configuration = self.configuration(module)
        names = {id(tensor): key for key, tensor in named_state(module)}
        made: dict[int, Tensor] = {}  # by the identity of the tensor it replaces, so that tied ones stay tied
        for owner in reversed(list(module.modules())):  # children first: Init partitions all that lies below
            for attribute, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = self._materialised(tensor, read and read(names[id(tensor)]))
                put(made[id(tensor)], [(owner, attribute)])
            if owner._parameters:
                with self._among_neighbours():
                    deepspeed.zero.Init(module=owner, config_dict_or_path=configuration,
                                        zero_param_parallel_group=self._neighbours)

    @torch.no_grad()
    def _materialised(self, tensor: Tensor, full: Tensor | None) -> Tensor:
        is_parameter = isinstance(tensor, nn.Parameter)
        dtype = DTYPES[self.precision] if is_parameter else tensor.dtype
        real = torch.empty_like(tensor, device=self.processes.device, dtype=dtype)
        if full is not None:
            fill_tensor(real, full)
        return nn.Parameter(real, requires_grad=tensor.requires_grad) if is_parameter else real

    def _check(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        """DeepSpeed has silently given less than it was asked for before: compare what it made with what was asked."""
        made = {
            "stage": engine.zero_optimization_stage(),
            "clipping": engine.gradient_clipping(),
            "optimizer": type(engine.basic_optimizer),
            "offload": bool(engine.zero_use_cpu_optimizer()),
            "neighbours": {getattr(each, "ds_zero_param_process_group", None) for each in engine.module.parameters()},
        }
        asked = {
            "stage": self.stage,
            "clipping": self.clip,
            "optimizer": type(optimizer),
            "offload": self.settings.offload == "cpu",
            "neighbours": {self._neighbours},
        }
        if made != asked:
            raise RuntimeError(f"DeepSpeed was asked for {asked} and made {made}")

    def _make_average(self, name: str) -> Average:
        return FlatAverage(self, name)

    def _synchronise_gradients(self, name: str, last: bool) -> None:
        self.networks[name].set_gradient_accumulation_boundary(last)
        if self._second_order:
            # As a forward through the wrapper does, and the start of the backward through what it returned.
            self.optimizers[name].clear_backward_seen_flag()

    def backward(self, name: str, loss: Tensor) -> None:
        if self._second_order:
            self.networks[name]._backward_prologue()
        # The loss is already divided by the global count: no further division by the accumulation steps.
        self.networks[name].backward(loss, scale_wrt_gas=False)

    def step(self, name: str, leave_out: LeaveOut = never) -> StepResult:
        optimizer = self.optimizers[name]
        results: list[StepResult] = []

        def leaves_out(norm: Tensor) -> bool:
            # Where there is a loss scaler the norm is of scaled gradients.
            results.append(StepResult(norm.double() / getattr(optimizer, "loss_scale", 1.0)))
            return bool(leave_out(results[0]))

        self._show_gradients(name)
        with judging(optimizer, self.stage, leaves_out):
            self.networks[name].step()
        return results[0]

    def _gradient_pieces(self, name: str) -> Iterable[Piece]:
        from deepspeed.utils import safe_get_full_grad

        for key, parameter in self.modules[name].named_parameters():
            full = safe_get_full_grad(parameter)
            if self.processes.is_main:
                yield Piece(key, tuple(full.shape), 0, full)

    def _restore_rounded(self, name: str, read: Read) -> None:
        if self.precision == "fp32":
            return
        # The fp32 master weights were made from rounded ones.
        for key, parameter in self.modules[name].named_parameters():
            self.set_full(parameter, read(key))

    def optimizer_state_to_come(self, name: str) -> list[Tensor]:
        inner = self.inner(name)  # stage 3 shows it one partition at a time
        return [torch.empty_like(flat) for flat in self.flat_partitions(name) if not inner.state.get(flat)
                for _ in range(moments(inner.param_groups[0]))]

    def bytes_at_rest(self) -> int:
        total = 0
        for name, module in self.modules.items():
            average = self.averages[name].held() if name in self.averages else []
            held: list[Any] = [*average, *module.buffers()]
            if name in self.optimizers:
                held += [*self.flat_partitions(name), *state_tensors(self.inner(name))]
            held += [getattr(p, "ds_tensor", p) for p in module.parameters()]
            held += [getattr(p, "ds_secondary_tensor", None) for p in module.parameters()]
            total += tensor_bytes(held)
        return total


def _use_own_linear() -> None:
    """Take back what an earlier stage 3 in this process has done to torch: DeepSpeed leaves its own linear in its place."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses, zero3_linear_wrap

    if nn.functional.linear is zero3_linear_wrap:
        nn.functional.linear = InsertPostInitMethodToModuleSubClasses.linear_bk
