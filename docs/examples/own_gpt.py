"""A GPT-2 of transformers, trained by genscale on blocks of text: a network, a loss and a data set of one's own.

    python docs/examples/own_gpt.py train --train.steps 100
    accelerate launch docs/examples/own_gpt.py train --parallel.strategy fsdp2 ...
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import tensor
from transformers import GPT2Config, GPT2LMHeadModel

import genscale

LENGTH = 64
TEXT = tensor(list(Path(argparse.__file__).read_bytes()))
BLOCKS = TEXT.unfold(0, LENGTH + 1, LENGTH)  # (blocks, 65): any data set with a length and numbers does


@dataclass
class Model:
    """A small GPT-2."""

    width: int = 32
    """Width of the embeddings."""
    layers: int = 2
    """Blocks."""


def network(model: Model) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=model.width, n_layer=model.layers, n_head=2,
                                      use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def loss(network, batch, draws):
    logits = network(batch["x"][:, :-1]).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), batch["x"][:, 1:], reduction="none")


def data(settings, seed: int) -> genscale.MapData:
    return genscale.MapData(BLOCKS, validation=64, seed=seed)


genscale.register(genscale.make_family(
    "own_gpt", network=network, loss=loss, data=data, model_settings=Model, count=lambda batch: batch["x"][:, 1:].numel(),
    loss_unit="nats per byte"))

if __name__ == "__main__":
    genscale.start()
