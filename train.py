"""`accelerate launch train.py --config ...` (or torchrun) is `genscale train --config ...` in every process it starts."""

from __future__ import annotations

import sys

from genscale.cli import start

if __name__ == "__main__":
    start(["train", *sys.argv[1:]])
