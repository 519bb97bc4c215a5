"""What the peers need besides their packages: nanoGPT, and tiny Shakespeare; fetched once, or given by path."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

COMMIT = "3adf61e154c3fe3fca428ad6bc3818b27a3b8291"
NANOGPT = f"https://raw.githubusercontent.com/karpathy/nanoGPT/{COMMIT}"
NANOGPT_FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py",
                 "data/shakespeare_char/prepare.py")
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
CACHE = Path.home() / ".cache" / "genscale-benchmarks"
TRAINING_CHARACTERS = 1003854  # nanoGPT's nine tenths


def _fetched(address: str, file: Path) -> Path:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(address, timeout=30) as answer:
            content = answer.read()
        file.write_bytes(content)
    return file


def shakespeare(given: Path | None, folder: Path) -> None:
    """Makes a folder with train.txt and val.txt, divided as nanoGPT divides the text. Raises OSError where it cannot be had.

    Args:
        given: the whole text in one file.
    """
    text = (given or _fetched(SHAKESPEARE, CACHE / "tinyshakespeare.txt")).read_bytes()
    folder.mkdir()
    (folder / "input.txt").write_bytes(text)
    (folder / "train.txt").write_bytes(text[:TRAINING_CHARACTERS])
    (folder / "val.txt").write_bytes(text[TRAINING_CHARACTERS:])


def nanogpt(given: Path | None, text: Path, folder: Path) -> None:
    """Makes a folder with nanoGPT as it is, whose own script prepares the text. Raises OSError where it cannot be had.

    Args:
        given: a folder that holds it.
        text: of `shakespeare`.
    """
    for name in NANOGPT_FILES:
        source = given / name if given else _fetched(f"{NANOGPT}/{name}", CACHE / "nanoGPT" / name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    prepare = folder / "data" / "shakespeare_char" / "prepare.py"
    shutil.copy(text / "input.txt", prepare.with_name("input.txt"))
    subprocess.run([sys.executable, str(prepare)], check=True, capture_output=True)
