"""What a process of a test of split sequences does: whole runs; and the loss of one sequence, with what is kept for backward.

`python -m genscale.testing.group 2 tests/distributed/context_worker.py '{"whole": {"time": 4096, "context": 1}, "split":
{"time": 4096, "context": 2}}' answers.pt` measures other lengths; each process of the group has its share of what is printed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from genscale.families.gpt.network import GPT, GPTSettings
from genscale.parallel.processes import Processes
from genscale.parallel.strategies import ParallelPlan
from genscale.rng import torch_generator
from genscale.testing.runs import train_in_group
from genscale.testing.workers import run_of, serve

DEFAULTS = {"time": 512, "context": 2}
VOCABULARY = 64


def answer(variant: dict[str, Any], processes: Processes, plan: ParallelPlan) -> Any:
    """The folder of a whole run; or of one sequence the bytes that this process keeps for backward, the loss, and the gradients
    by name."""
    if "run" in variant:
        run = run_of(variant, processes)
        train_in_group(run.folder, variant["run"], processes)
        return str(run.folder)
    processes.split_sequences(variant["context"])
    time, part = variant["time"], processes.part
    network = GPT(GPTSettings(layers=2, heads=4, width=64, positions=time), VOCABULARY)
    network.initialise(0)
    network.part = part
    tokens = torch.randint(0, VOCABULARY, (1, time + 1), generator=torch_generator(0, "tokens"))
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}, dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(tokens[:, :-1], targets=part.of_time(tokens[:, 1:]))
    loss.backward()
    copies = processes.data_world  # of the sequence
    gradients = {name: processes.sum(p.grad) / copies for name, p in network.named_parameters() if p.grad is not None}
    answers = {"kept": sum(kept.values()), "loss": (processes.sum(loss.detach()) / copies).item(), "gradients": gradients}
    if processes.is_main:
        print(f"{variant['name']}: {answers['kept'] / 2**20:.2f} MiB kept for backward of {time} tokens")
    return answers


if __name__ == "__main__":
    serve(answer, DEFAULTS)
