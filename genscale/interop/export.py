"""Writing a Hugging Face folder, and proving that transformers reads the same model out of it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from genscale.data.text.tokenizers import Tokenizer
from genscale.errors import UserError
from genscale.families.gpt.settings import ResolvedGPTSettings
from genscale.interop.architectures import class_for, config_json
from genscale.interop.huggingface import CONFIG
from genscale.interop.tokenizer_files import write_tokenizer
from genscale.interop.weights import SHARD_BYTES, Read, write_weights

TOLERANCE = 1e-4
"""Largest difference of logits allowed, as a share of the largest logit: some fifty times what other kernels and another order
of sums make in fp32, and a ten-thousandth of what a wrong weight makes."""
CHECK_TOKENS = 64
CHECK_TEXTS = ("The quick brown fox jumps over the lazy dog. 12345 67.89\n\n\tdef f(x):\n        return x  # ok",
               "  Größe: 漢字かな交じり文, עברית, हिन्दी, 🙂👩‍👩‍👧 e\u0301 \x00\x7f ")


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        settings: resolved.
        vocab_size: rows of the embedding table.
        read: parameters by name, in full.
        tokenizer: the run's.
        kept: folder that may hold the generation_config.json of the model that the run started from.
    """

    settings: ResolvedGPTSettings
    vocab_size: int
    read: Read
    tokenizer: Tokenizer
    kept: Path


def check_out(out: Path) -> None:
    """Raise UserError where `out` cannot become the folder."""
    if out.is_file():
        raise UserError(f"--out: {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out: {out} exists and is not empty; give a folder that does not exist yet")


def export(source: Source, out: Path, dtype: torch.dtype, logits_of: Callable[[Tensor], Tensor],
           shard_bytes: int = SHARD_BYTES) -> float | None:
    """Write the folder, whole or not at all, and have transformers read it where it is installed.

    Args:
        dtype: float32 or bfloat16.
        logits_of: our network's, with weights rounded to `dtype`: tokens `(batch, time)` to `(batch, time, vocab_size)` fp32.

    Returns:
        The largest difference of logits; None where there is no transformers to check with.

    Raises:
        UserError: `out` is taken or cannot be written to, no Hugging Face class has the model, or transformers reads another
            model out of the folder.
    """
    check_out(out)
    out = out.expanduser().absolute()
    partial = out.parent / f".partial-{out.name}-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write(source, partial, dtype, shard_bytes)
        difference = _check(source, partial, logits_of) if importlib.util.find_spec("transformers") else None
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out} ({error.strerror or error}); nothing was left there") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _write(source: Source, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    settings = source.settings
    config = config_json(settings, source.vocab_size, str(dtype).removeprefix("torch."), source.tokenizer.end_of_text)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    write_weights(class_for(settings), settings, source.vocab_size, source.read, dtype, folder, shard_bytes)
    write_tokenizer(source.tokenizer, settings.positions, folder, source.kept)


@torch.no_grad()
def _check(source: Source, folder: Path, logits_of: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of logits. Raises UserError where transformers' differ, or its token ids."""
    import transformers

    where = f"transformers {transformers.__version__}"
    with _quiet(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text, ids in zip(CHECK_TEXTS, source.tokenizer.encode_batch(CHECK_TEXTS), strict=True):
            if theirs.encode(text, add_special_tokens=False) != ids or theirs.decode(
                    ids, clean_up_tokenization_spaces=False) != source.tokenizer.decode(ids):
                raise UserError(f"export: {where} reads another tokenizer out of the folder: {text!r} has other ids or another "
                                "text; nothing was left behind; data.tokenizer must be one that AutoTokenizer reads unchanged")
        time = min(CHECK_TOKENS, source.settings.positions)
        tokens = torch.randint(source.vocab_size, (2, time), generator=torch.Generator().manual_seed(0))
        # Ours first, and gone before theirs is loaded: one model is held at a time.
        ours = logits_of(tokens)
        network: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = network.eval()(tokens).logits
    difference = (ours - expected).abs().max().item()
    if not difference <= TOLERANCE * expected.abs().max().item():
        raise UserError(f"export: {where} reads another model out of the folder: logits differ by up to {difference:.2g}; "
                        "nothing was left behind; this is a defect of genscale, or of this version of transformers")
    return difference


class _quiet:
    """transformers without progress bars and advice: what matters is said by the export itself."""

    def __init__(self, transformers: ModuleType) -> None:
        self.logging = transformers.utils.logging

    def __enter__(self) -> None:
        self.level, self.bars = self.logging.get_verbosity(), self.logging.is_progress_bar_enabled()
        self.logging.set_verbosity_error()
        self.logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self.logging.set_verbosity(self.level)
        if self.bars:
            self.logging.enable_progress_bar()
