"""`genscale train` in a process whose weights come apart from the others': started by torchrun with genscale's own arguments.

From step 3 on, process 1 has another bias than process 0.
"""

from __future__ import annotations

import sys

import torch

from genscale.cli import main
from genscale.parallel.averages import local
from genscale.parallel.exit_together import run_and_leave
from genscale.training.trainer import Trainer

plain = Trainer.update_averages


@torch.no_grad()
def planted(self: Trainer, step: int) -> None:
    if step == 3 and self.processes.rank == 1:
        local(self.engine.modules["vae"].get_parameter("encoder.head.bias"))[0] += 1e-7
    plain(self, step)


if __name__ == "__main__":
    Trainer.update_averages = planted
    run_and_leave(lambda: sys.exit(main(sys.argv[1:])))
