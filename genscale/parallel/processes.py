"""The processes of a run: who we are, on which device, and the few collectives the rest of genscale needs."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from mmap import mmap
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from genscale.errors import PortTaken, UserError
from genscale.models.device_kind import is_planned
from genscale.models.sequence_part import WHOLE, SequencePart
from genscale.parallel.precision import keep_fp32

T = TypeVar("T")
BOARD = 128
_stores: list[tuple[dist.Store, str]] = []
"""Where the processes have met first, and over which backend: a later run of this process meets there again. A second meeting
at the launcher's address would find what the first has left."""
_later_runs = itertools.count(1)


class Processes:
    """The process group, set up through Accelerate (device choice, rendezvous, backends of every vendor).

    Args:
        need_group: make a process group even for a single process (ZeRO and FSDP2 need one).
        timeout_minutes: a collective that waits longer raises instead of hanging for ever.
        context: so many neighbouring processes read the same samples, and compute a part of each sequence.

    Raises:
        PortTaken: the processes cannot meet.

    Attributes:
        accelerator: the `accelerate.Accelerator`; it wraps networks for DDP and owns nothing else.
        rank, world_size, device: of this process.
        part: of each sequence that this process computes.
        doing: what it is at, as a person would say it; see `note`.
        beats: how often it has said so.
        writes: how often a file that is being written in the background has come on.
        board: what `doing` is written to besides, if anything: memory that other processes can read, of BOARD bytes.
    """

    def __init__(self, need_group: bool = False, timeout_minutes: float = 30, context: int = 1) -> None:
        from accelerate import Accelerator, PartialState
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        self.doing, self.beats, self.writes = "starting", 0, 0
        self.board: mmap | None = None
        self._is_guest = dist.is_initialized()  # in a group, or beside an Accelerator, of the script that called
        self._shares_accelerate = bool(PartialState._shared_state)
        use_cpu = on_cpu()
        if self._is_guest:
            pass
        elif "RANK" in os.environ and _stores:
            _meet_again(timeout_minutes)
        elif need_group and "RANK" not in os.environ:
            backend = "gloo" if use_cpu else "cuda:nccl,cpu:gloo"
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        # DDP with BatchNorm called twice before backward fails if buffers are broadcast in forward (pytorch issue 175024).
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor is not in torch 2.11
        handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        if "RANK" in os.environ:
            chosen = "gloo" if use_cpu else None
            handlers.append(InitProcessGroupKwargs(backend=chosen, timeout=timedelta(minutes=timeout_minutes)))
        # mixed_precision="no": genscale.parallel.precision owns precision, alike under every strategy.
        try:
            self.accelerator = Accelerator(cpu=use_cpu, mixed_precision="no", kwargs_handlers=handlers)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise PortTaken(f"MASTER_PORT: {os.environ.get('MASTER_PORT')} is taken by another program on "
                            f"{os.environ.get('MASTER_ADDR')}; start again with another port (the next life of a job has "
                            "one)") from None
        self.device: torch.device = self.accelerator.device
        if self.device.type == "cpu":
            self.device = torch.device("cpu")  # without an index, by which a compiler takes it for another than that of tensors
        keep_fp32()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if "RANK" in os.environ and not self._is_guest and not _stores:
            _stores.append((dist.distributed_c10d._get_default_store(), dist.get_backend()))
        # What the host knows is agreed upon between hosts, without waiting for what the devices still compute.
        self._host_group = None
        if self.world_size > 1 and self.device.type != "cpu":
            self._host_group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._timeout = timedelta(minutes=timeout_minutes)
        self.split_sequences(context)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples this process reads: that of its group where sequences are split, else its own."""
        return self.rank // self.part.of

    @property
    def data_world(self) -> int:
        """Into how many shares the samples are dealt."""
        return self.world_size // self.part.of

    def split_sequences(self, context: int) -> None:
        """From here on, so many neighbouring processes are a group that computes the same samples. Collective."""
        self.part = WHOLE
        if context > 1:
            group, _ = dist.new_subgroups(group_size=context, timeout=self._timeout)
            self.part = SequencePart(self.rank % context, context, group)

    def once(self, number: int) -> int:
        """A number of the samples that this process has read, for a sum over all processes: of those that read the same, the
        first has it, and the others 0."""
        return 0 if self.part.index else number

    def note(self, doing: str) -> None:
        """Progress: this process is now at `doing`, as in "step 12, phase generator, backward". The watchdog reads it."""
        self.doing = doing
        self.beats += 1
        if self.board is not None:
            self.board[:] = doing.encode()[:BOARD].ljust(BOARD)

    def note_write(self) -> None:
        """Progress of a file that is being written in the background, which the process may come to wait for."""
        self.writes += 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on every process."""
        if self.world_size > 1:
            tensor = tensor.to(self.device).clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_of_numbers(self, *numbers: int) -> list[int]:
        """The sums of whole numbers over all processes (modulo 2**64), on every process; no device takes part."""
        return self.begin_sum_of_numbers(*numbers)()

    def begin_sum_of_numbers(self, *numbers: int) -> Callable[[], list[int]]:
        """The same, on its way while this process goes on; whoever calls what is returned waits for it."""
        if self.world_size == 1 or not numbers:
            return lambda: list(numbers)
        tensor = torch.tensor(numbers)
        work = dist.all_reduce(tensor, group=self._host_group, async_op=True)

        @functools.cache
        def wait() -> list[int]:
            work.wait()
            return tensor.tolist()

        return wait

    def from_main(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor of the same shape, on every process; on the device where there are several."""
        if self.world_size > 1:
            tensor = tensor.to(self.device).clone()
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give the tensor the values that it has on rank `source`, in place; on the device where there are several."""
        dist.broadcast(tensor, src=source)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def main_does(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and give every process its result, or its error: no process waits for one that failed."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                if self.world_size == 1:
                    raise
                known = isinstance(error, (UserError, OSError))
                outcome[1] = error if known else RuntimeError(f"{type(error).__name__}: {error}")
                original = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self._host_group)
            if outcome[1] is not None:
                raise (original if self.is_main else outcome[1])
        return outcome[0]

    def all_do(self, work: Callable[[], T]) -> T:
        """Run `work` on every process; if it fails with a UserError anywhere, every process raises the first such error."""
        result, mistake = None, None
        try:
            result = work()
        except UserError as error:
            mistake = error
        for first in self.gather(mistake):
            if first is not None:
                raise first
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the group, where it was made for this run; another run of this process makes its own."""
        from accelerate.state import AcceleratorState

        if dist.is_initialized() and not self._is_guest:
            gc.collect()  # wrappers hold the group, whose threads should not outlive it
            deepspeed = sys.modules.get("deepspeed.comm")
            if deepspeed is not None and deepspeed.comm.cdb is not None:
                deepspeed.destroy_process_group()  # which forgets the groups that it has kept, too
            else:
                dist.destroy_process_group()
        if not self._is_guest and not self._shares_accelerate:
            AcceleratorState._reset_state(reset_partial_state=True)


def _meet_again(timeout_minutes: float) -> None:
    """The group of a later run of this process."""
    store, backend = _stores[0]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=dist.PrefixStore(f"genscale/{next(_later_runs)}", store), rank=rank,
                            world_size=world_size, timeout=timedelta(minutes=timeout_minutes))


class HostCopy:
    """A small tensor on its way from the device to the host, which does not wait for it before `read`."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        if is_planned():  # it has no values
            return [0.0] * self._tensor.numel()
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


def load_ahead(deepspeed: bool) -> None:
    """Import the libraries that the processes of a group load as they begin, for those that are forked from this one; DeepSpeed
    takes as long as torch, and not all groups need it."""
    import accelerate  # noqa: F401
    import torch._dynamo  # noqa: F401  # which an optimizer loads

    if deepspeed:
        # Which ZeRO loads as it looks at an optimizer, and torch's whole compiler with it.
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because a process at its other end is gone (in the words of gloo and NCCL)."""
    words = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")
    return any(word in str(error) for word in words)


def on_cpu() -> bool:
    """Whether this run computes on the CPU: no CUDA device here, or `accelerate launch --cpu` asked for it."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return asked or not torch.cuda.is_available()
