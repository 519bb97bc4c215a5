"""`model.from` where it names a run of genscale's own: its shape, its tokenizer, and the weights of its latest checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints
from genscale.checkpoint.tensor_files import TensorFiles
from genscale.errors import UserError
from genscale.interop.huggingface import CONFIG

WRITERS = {"gpt": "gpt", "reward": "policy"}
"""The network that writes text, by family."""


def find_run(name: str, read: bool = False) -> Checkpoint | None:
    """The checkpoint that a run folder (its latest whole one) or a checkpoint folder means; None where `name` is neither.

    Args:
        read: it will be read: every byte is verified.

    Raises:
        UserError: every checkpoint is damaged, or there is none yet.
    """
    path = Path(name).expanduser()
    if (path / CONFIG).is_file() or not ((path / "checkpoints").is_dir() or (path / "manifest.json").is_file()):
        return None
    try:
        found = list(find_checkpoints(path))
    except UserError as error:
        raise UserError(f"model.from: {error}") from None
    for checkpoint in reversed(found):
        if checkpoint.has_its_files() and not (read and checkpoint.problem()):
            return checkpoint
    raise UserError(f"model.from: {found[-1].path} is damaged ({found[-1].problem()}), and no other checkpoint of {name} is "
                    "whole; copy it again, or start from another run")


def settings_of_run(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The fields of `GPTSettings` that the run has, with the rows of its embedding table.

    Raises:
        UserError: it is a run of another family.
    """
    model = dict(checkpoint.config()["model"])
    family = model.pop("family", None)
    model.pop("from", None)
    if family not in WRITERS:
        raise UserError(f"model.from: {name} is a run of model.family {family}, which writes no text; to tune one that makes "
                        "pictures set model.family: image_reward")
    rows = checkpoint.tensors("networks", WRITERS[family]).shapes()["token_embedding.weight"][0]
    return {**model, "vocab_size": rows}


def weights_of_run(checkpoint: Checkpoint) -> TensorFiles:
    """The weights of the network that writes text, averaged where the run kept an average, as its samples are made with."""
    return checkpoint.weights(WRITERS[checkpoint.config()["model"]["family"]], averaged=True)


def folder_of_run(checkpoint: Checkpoint) -> Path:
    """The run folder, which keeps the tokenizer."""
    return checkpoint.path.resolve().parent.parent
