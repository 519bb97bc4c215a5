"""One training step of ours as a call, of any family, and the batches that it reads."""

from __future__ import annotations

from genscale.data.loader import StepLoader
from genscale.families import family
from genscale.hook import StepReport
from genscale.objectives.base import Objective
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import build_engine, plan_parallel
from genscale.settings.config import Config, micro_batch_of
from genscale.supervise.signals import StopSignal
from genscale.training.optimizers import make_optimizer
from genscale.training.setup import averaged_networks
from genscale.training.trainer import Trainer

from torch import Tensor


class OurSteps:
    """What `genscale train` does in a step: StepLoader, objective, engine with averages, Trainer.train_step; no hooks.

    Args:
        kind: of the trainer.
    """

    def __init__(self, config: Config, kind: type[Trainer] = Trainer) -> None:
        plan = plan_parallel(config.parallel, config.train.precision)
        config, self.precision = plan.settled(config), plan.precision
        batch = config.train.global_batch_size
        micro = micro_batch_of(config.train) or batch
        chosen = family(config.model.family)
        self.data = chosen.build_data(config.data, config.run.seed)
        self.objective: Objective = chosen.build_objective(config, self.data)
        self.parameters = sum(p.numel() for network in self.objective.networks.values() for p in network.parameters())
        self.processes = Processes(need_group=plan.needs_group)
        engine = build_engine(plan, self.processes, config.parallel, plan.precision, config.train.clip, micro, batch // micro)
        engine.prepare(self.objective.networks, lambda module: make_optimizer(module, config.optimizer),
                       {name: self.objective.initial_weights(name) for name in self.objective.networks},
                       averaged_networks(config.train.ema_half_life, config.model.family, self.objective))
        self.loader = StepLoader(self.data, global_batch_size=batch, micro_batch_size=micro, rank=0, world_size=1,
                                 workers=config.data.workers, prefetch_steps=config.data.prefetch_steps,
                                 pin_memory=self.processes.device.type == "cuda")
        self.trainer = kind(config, self.objective, engine, self.loader, hooks=[], last_good=lambda: "none")
        self._stop, self._step = StopSignal(), 0

    def __call__(self) -> StepReport:
        self._step += 1
        return self.trainer.train_step(self._step, self._stop)

    def close(self) -> None:
        self.loader.close()
        self.processes.close()


def first_batches(config: Config, count: int) -> list[Tensor]:
    """The tokens `(batch, sequence_length + 1)` of the first steps on text, as our steps read them."""
    data, batch = family("gpt").build_data(config.data, config.run.seed), config.train.global_batch_size
    loader = StepLoader(data, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1, workers=0,
                        prefetch_steps=2)
    batches = [loader.next_batch()[0]["tokens"].long() for _ in range(count)]
    loader.close()
    return batches
