"""What the GPTs of this folder read: blocks of bytes at random places of a text. Nothing here loads genscale."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """The command line of a GPT's shape and text; options: more flags, with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", type=Path, required=True)
    for name in ("layers", "heads", "width", "time", "batch", "vocab_size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


class Blocks:
    """A map-style dataset of blocks `(time,)` and as many as a run asks for; labels are the inputs, which the model shifts."""

    def __init__(self, text: Path, time: int, count: int = 10**7) -> None:
        self.tokens = np.fromfile(text, np.uint8)
        self.time, self.count = time, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        start = int(np.random.default_rng(index).integers(len(self.tokens) - self.time))
        block = torch.from_numpy(self.tokens[start : start + self.time].astype(np.int64))
        return {"input_ids": block, "labels": block}
