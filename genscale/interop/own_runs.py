"""Runs of genscale's own that a config names: which checkpoint is meant; and of one that writes text, for `model.from`, its
shape, its tokenizer and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genscale.checkpoint.checkpoints import Checkpoint, find_checkpoints
from genscale.checkpoint.tensor_files import TensorFiles
from genscale.errors import UserError
from genscale.interop.huggingface import CONFIG
from genscale.reading import Unreadable, read_yaml

WRITERS = {"gpt": "gpt", "reward": "policy"}
"""The network that writes text, by family."""


def find_run(name: str, read: bool = False) -> Checkpoint | None:
    """`whole_checkpoint`; None where `name` is neither a run folder nor a checkpoint, but a model of Hugging Face's."""
    path = Path(name).expanduser()
    if (path / CONFIG).is_file() or not ((path / "checkpoints").is_dir() or (path / "manifest.json").is_file()):
        return None
    return whole_checkpoint(name, read=read)


def whole_checkpoint(name: str, step: int | None = None, read: bool = False, key: str = "model.from") -> Checkpoint:
    """The checkpoint that a run folder (its latest whole one, or that of `step`) or a checkpoint folder means.

    Args:
        read: it will be read: every byte is verified.
        key: of the setting that names it.

    Raises:
        UserError: every checkpoint is damaged, or there is none (of that step).
    """
    try:
        found = list(find_checkpoints(Path(name).expanduser()))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    asked = [checkpoint for checkpoint in found if step in (None, checkpoint.step)]
    if not asked:
        raise UserError(f"{key}: {name} has no checkpoint of step {step}; copy it again, or begin from another run")
    for checkpoint in reversed(asked):
        if checkpoint.has_its_files() and not (read and checkpoint.problem()):
            return checkpoint
    raise UserError(f"{key}: {asked[-1].path} is damaged ({asked[-1].problem()}), and no other checkpoint of {name} is whole; "
                    "copy it again, or begin from another run")


def recorded_model(recorded: Path) -> dict[str, Any]:
    """The section `model` of a checkpoint that a run goes on from. Raises UserError where there is none."""
    try:
        model = read_yaml(recorded / "config.yaml")["model"]
    except (OSError, Unreadable, KeyError, TypeError):
        model = None
    if not isinstance(model, dict):
        raise UserError(f"run.resume: {recorded / 'config.yaml'} is damaged: it holds no section 'model'")
    return model


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
