"""The loss of nanoGPT's checkpoint on the whole validation text, in blocks one after the other.

    python nanogpt_loss.py out/ckpt.pt data/shakespeare_char/val.bin
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from model import GPT, GPTConfig  # nanoGPT's, on PYTHONPATH

checkpoint = torch.load(sys.argv[1], weights_only=False)
shape = GPTConfig(**checkpoint["model_args"])
network = GPT(shape)
network.load_state_dict(checkpoint["model"])
network.eval()
tokens = torch.from_numpy(np.fromfile(sys.argv[2], np.uint16).astype(np.int64))
total, count = 0.0, 0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, shape.block_size):
        inputs, targets = tokens[start : start + shape.block_size], tokens[start + 1 : start + 1 + shape.block_size]
        loss = network(inputs[None, : len(targets)], targets[None])[1]
        total, count = total + loss.item() * len(targets), count + len(targets)
print(f"whole validation text {total / count:.5f}")
