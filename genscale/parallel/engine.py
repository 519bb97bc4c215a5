"""HOW a step is spread: the engine's contract.

The trainer sees networks to call, `backward`, `step` and state by parameter name; which strategy does the work is known in
this package alone.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genscale.models.moving_state import MovingState, moving_layers
from genscale.models.network_parts import blocks_of
from genscale.objectives.base import Rollout, in_evaluation
from genscale.parallel.activation_checkpointing import checkpoint_activations
from genscale.parallel.averages import Average
from genscale.parallel.dealing import dealt
from genscale.parallel.engine_state import EngineState, NamedTensors
from genscale.parallel.generating import fits
from genscale.parallel.materialise import Read, fill, materialise, named_state
from genscale.parallel.pieces import Piece
from genscale.parallel.precision import DTYPES, use_float8
from genscale.parallel.processes import Processes
from genscale.settings.config import ParallelSettings

__all__ = ["Engine", "LeaveOut", "MakeOptimizer", "NamedTensors", "Read", "StepResult", "named_state", "never"]

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepResult:
    """What is known of an update before it is made.

    Attributes:
        grad_norm: global gradient norm before clipping, a scalar still on the device: reading it would make the loop wait.
        scaled: a loss scaler is at work (fp16): where the norm is not finite, it leaves the weights alone.
    """

    grad_norm: Tensor
    scaled: bool = False


LeaveOut = Callable[[StepResult], bool | Tensor]
"""Whether to leave an update out, alike on every process; where the optimizer `skips_on_device`, a scalar on the device serves,
which the host need not know."""


def never(_result: StepResult) -> bool:
    return False


class Engine(EngineState):
    """Networks and optimizers under one strategy.

    Args:
        processes: the process group.
        settings: the `parallel` section.
        precision: fp32, bf16, fp16 or fp8.
        clip: largest global gradient norm (0 = no clipping).
        micro_batch_size, accumulation: of a step, for the strategies that want to know.

    Attributes:
        on_gradients: is shown the network's name and its gradients in every step, averaged over processes and not yet clipped;
            it must exhaust them.
        frozen: networks that are never trained; they have no optimizer.
    """

    def __init__(self, processes: Processes, settings: ParallelSettings, precision: str, clip: float,
                 micro_batch_size: int, accumulation: int) -> None:
        self.processes, self.settings, self.precision, self.clip = processes, settings, precision, clip
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.networks: dict[str, nn.Module] = {}  # to call
        self.modules: dict[str, nn.Module] = {}  # the plain modules inside
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.averages: dict[str, Average] = {}
        self.frozen: frozenset[str] = frozenset()
        self.on_gradients: Callable[[str, Iterable[Piece]], None] | None = None
        self._second_order = False
        self._generating: set[str] = set()
        # By network, found once: a walk through a small network's modules takes as long as a layer's forward.
        self._layers: dict[str, list[nn.Module]] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._moving: dict[str, list[MovingState]] = {}

    @property
    @abstractmethod
    def strategy(self) -> str:
        """As `parallel.strategy` names it."""

    @property
    def shard(self) -> int:
        """Which shard of what is sharded this process holds; several may hold the same one."""
        return self.processes.rank

    def prepare(self, networks: Mapping[str, nn.Module], make_optimizer: MakeOptimizer,
                weights: Mapping[str, Read] | None = None, averaged: Iterable[str] = (),
                frozen: Iterable[str] = ()) -> None:
        """Give every network its weights, wrap it, and build its optimizer.

        Args:
            networks: on the meta device, or (small ones) materialised on the CPU.
            weights: by network, what gives each tensor in full; every process asks for some of them, and sends these to the
                others. A sharded network keeps no more of a tensor than its shard. None: the networks, on the CPU, have their
                weights already.
            averaged: the networks to keep an average of; it begins as the weights.
            frozen: the networks that are never trained; they are spread like the others, and get no optimizer.
        """
        self.frozen = frozenset(frozen)
        for name, module in networks.items():
            if self.processes.world_size > 1:
                for layer in moving_layers(module):
                    layer.all_sum = self.processes.sum
            blocks = blocks_of(module)
            if self.precision == "fp8":
                use_float8(blocks)
            if self.settings.compile:
                _settle_compiler()
            checkpoint_activations(blocks or [module], self.settings.activation_checkpointing if blocks else "none",
                                   self.settings.compile, self.settings.activation_offload)
            read = None
            if weights is not None:
                read = dealt(weights[name], {key: tensor.shape for key, tensor in named_state(module)}, self.processes)
            if name in self.frozen:
                module.requires_grad_(False).eval()
                self._hold(name, module, read)
            else:
                self._wrap(name, module, make_optimizer, read)
                if read is not None:
                    self._restore_rounded(name, read)
            self._layers[name] = list(self.networks[name].modules())
            self._parameters[name] = list(self.modules[name].parameters())
            state = [tensor for _, tensor in named_state(self.modules[name])]
            self._buffers[name] = [tensor for tensor in state if not isinstance(tensor, nn.Parameter)]
            self._moving[name] = moving_layers(self.modules[name])
        for name in averaged:
            self.averages[name] = self._make_average(name)

    @abstractmethod
    def _wrap(self, name: str, module: nn.Module, make_optimizer: MakeOptimizer, read: Read | None) -> None:
        """Materialise and fill the module, set modules[name], networks[name] and optimizers[name]."""

    def _hold(self, name: str, module: nn.Module, read: Read | None) -> None:
        """Materialise and fill the module, set modules[name] and networks[name]: whole on every process, where weights are."""
        materialise(module, self.processes.device)
        if read is not None:
            fill(module, read)
        self.modules[name] = self.networks[name] = module

    def _restore_rounded(self, name: str, read: Read) -> None:
        """Set what rounding lost when the network was wrapped; nothing to do where weights stay fp32."""

    def view(self, trained: str | None) -> dict[str, nn.Module]:
        """The networks a phase calls: the trained one wrapped, the frozen ones plain (their gradients are nobody's
        business). In a phase of the second order all are plain: wrappers take the first backward for the only one."""
        wrapped = {name for name in self.networks if name == trained and not self._second_order}
        return {name: self.networks[name] if name in wrapped else self.modules[name] for name in self.networks}

    def train_only(self, name: str | None, second_order: bool = False) -> None:
        """Freeze every network but one, moving state included; None thaws them all.

        Args:
            second_order: the phase takes gradients of gradients.
        """
        self._second_order = second_order
        if len(self.modules) > 1:
            for other in self.modules:
                trains = name in (None, other) and other not in self.frozen
                for parameter in self._parameters[other]:
                    if parameter.requires_grad != trains:
                        parameter.requires_grad_(trains)
                for layer in self._moving[other]:
                    layer.is_trained = trains

    @contextlib.contextmanager
    def generating(self, name: str) -> Iterator[Rollout]:
        """Inside, the network computes as in evaluation and without gradients, and where it is sharded every process holds it
        whole, if that fits (`genscale.parallel.generating.fits`) on all of them: its forwards are then no business of the other
        processes. To enter is collective; to leave is not. Forwards of other sharded networks stay collective. Enter it before
        the forward whose gradients are wanted, not between that and its backward."""
        module = self.modules[name]
        with contextlib.ExitStack() as stack:
            together = False
            if not self.whole_weights and name not in self._generating:
                together = self._any(not fits(self._bytes_whole(name), self.processes.device))
                if not together:
                    stack.enter_context(self._gathered(name))
                    self._generating.add(name)
                    stack.callback(self._generating.discard, name)
            stack.enter_context(in_evaluation(module))
            yield Rollout(module, self._any if together else bool, together)

    def _any(self, wanted: bool) -> bool:
        """Whether any process wants it."""
        return bool(sum(self.processes.sum_of_numbers(int(wanted))))

    def _bytes_whole(self, name: str) -> int:
        """Of the whole network, as it computes."""
        size = DTYPES[self.precision].itemsize
        return size * sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.modules[name].parameters())

    @contextlib.contextmanager
    def _gathered(self, name: str) -> Iterator[None]:
        """Inside, every process holds the network whole, and a forward concerns no other."""
        yield

    def training_mode(self, name: str) -> None:
        """Every layer of the network computes as in training."""
        if not all(layer.training for layer in self._layers[name]):  # to look takes a tenth of the time
            self.networks[name].train()

    def begin_update(self, name: str) -> None:
        """An update of the network is about to be made: what goes with an update, not with a forward, is now due."""
        for layer in self._moving[name]:
            layer.begin_update()

    @torch.no_grad()
    def end_update(self, name: str) -> None:
        """All backwards of the update are done: state that moves once an update, from the whole batch, moves. Collective."""
        for layer in self._moving[name]:
            layer.end_update()

    def forward_context(self) -> contextlib.AbstractContextManager:
        """The context of every forward (autocast where the strategy keeps fp32 weights; never in a phase of the second
        order)."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def micro_batch(self, name: str, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over processes by the end of the last one."""
        self._synchronise_gradients(name, last)
        yield

    @abstractmethod
    def _synchronise_gradients(self, name: str, last: bool) -> None:
        """Whether the coming backward is the one that averages over processes."""

    @abstractmethod
    def backward(self, name: str, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the network."""

    @abstractmethod
    def step(self, name: str, leave_out: LeaveOut = never) -> StepResult:
        """Clip, update the weights, drop the gradients. An update that is left out drops the gradients alone: weights and
        optimizer state stay as they are, bit for bit."""

    def skips_on_device(self, name: str) -> bool:
        """Whether the network's optimizer can be told on the device alone to leave an update out."""
        return False

    def _show_gradients(self, name: str) -> None:
        """In the middle of `step`."""
        if self.on_gradients is not None:
            self.on_gradients(name, self._gradient_pieces(name))

    @abstractmethod
    def _gradient_pieces(self, name: str) -> Iterable[Piece]:
        """This process's pieces of the gradients of the coming step, by parameter name. Collective."""

    def set_learning_rate(self, name: str, lr: float) -> None:
        for group in self.optimizers[name].param_groups:
            group["lr"] = lr

    def update_average(self, name: str, decay: float | Tensor) -> None:
        """After a step of the network: average = decay * average + (1 - decay) * weights. Buffers in floating point (running
        statistics) are averaged too. A decay of 1 on the device leaves the average as it is."""
        self.averages[name].update(decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the networks that have an average hold it; afterwards their weights are back, bit for bit. Collective."""
        shown: list[Average] = []
        try:
            for average in self.averages.values():
                average.show()
                shown.append(average)
            yield
        finally:
            for average in shown:
                average.hide()


def _settle_compiler() -> None:
    """What compiled blocks ask of torch.compile."""
    # Blocks differ in their number alone (dropout's stream): one graph for all, not one each until the limit.
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    # A convolutional block has a graph for each size, mode and gradient that is wanted (19 in a GAN of 256 pixels); the block
    # that is one too many would stay as it is, without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # DDP's own hooks reduce a block's gradients as it is done: no graph need be cut for that.
    torch._dynamo.config.optimize_ddp = False
