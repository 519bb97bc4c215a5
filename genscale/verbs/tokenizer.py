"""genscale tokenizer train: a byte-level BPE from the training documents of a source."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import PositiveInt

from genscale.data.text.settings import TextDataSettings
from genscale.errors import UserError, nearest
from genscale.settings.parser import parse_settings

DESCRIPTION = "Train a byte-level BPE tokenizer on the training documents of a source (never on its held-out ones)."


@dataclass
class TokenizerSettings:
    """The tokenizer and its text."""

    data: TextDataSettings = field(default_factory=TextDataSettings)
    vocab_size: PositiveInt = 4096
    """Most tokens of the vocabulary, at least 257 (every byte and the end of text); little text may give fewer."""
    text_megabytes: PositiveInt = 1000
    """Most text to learn from; a vocabulary hardly changes with more. Of several sources, as the weights have it."""
    out: str = "tokenizer.json"
    """File to write, or a folder for tokenizer.json; then set data.tokenizer to it."""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] != "train":
        if {"-h", "--help"} & set(arguments):
            arguments = ["train", "--help"]
        else:
            word = arguments[0] if arguments else ""
            raise UserError(f"genscale tokenizer: '{word}' is not one of: train{nearest(word, ['train'])}")
    settings = parse_settings(TokenizerSettings, arguments[1:], "genscale tokenizer train", DESCRIPTION)
    _check_writable(Path(settings.out))
    from genscale.data.text.data import train_tokenizer
    from genscale.data.text.tokenizers import load_tokenizer
    from genscale.data.text.vocabulary import console_progress

    path = train_tokenizer(settings.data, settings.vocab_size, Path(settings.out), console_progress(), settings.text_megabytes)
    tokenizer = load_tokenizer(str(path))
    print(f"{path}: {tokenizer.vocab_size} tokens; use it with --data.tokenizer {shlex.quote(str(path))}")
    return 0


def _check_writable(out: Path) -> None:
    """Raise UserError, before the text is read."""
    file = out if out.suffix == ".json" else out / "tokenizer.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        existed = file.exists()
        file.open("ab").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"out: cannot write {file} ({error.strerror}); give a path in a folder you can write to") from None
