"""`model.from`: a run that starts from a Hugging Face model or from another run takes its shape, tokenizer and weights.

Only the start needs the model: the shape goes into the run's config.yaml, the weights into its checkpoints, and the tokenizer
into its folder, from where a resumed run takes them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from genscale.data.text.tokenizers import load_tokenizer
from genscale.errors import UserError
from genscale.interop.huggingface import TOKENIZER, find_folder, open_huggingface, read_settings
from genscale.interop.own_runs import find_run, folder_of_run, recorded_model, settings_of_run, weights_of_run
from genscale.interop.source_runs import begins_from_run, with_source
from genscale.interop.tokenizer_files import GENERATION_CONFIG
from genscale.interop.weights import Read
from genscale.settings.config import Config, DataSettings, ModelSettings
from genscale.writing import write_whole

SCRATCH = "scratch"
"""A `model.from` that says there is nothing to start from."""
FREE = {"family", "from_", "dropout", "attention_dropout", "loss_chunk", "init_std"}
"""Settings that are the run's own whatever it starts from."""


@runtime_checkable
class StartsFromModel(ModelSettings, Protocol):
    """The `model` section of a family that can start from a Hugging Face model."""

    @property
    def from_(self) -> str | None: ...

    @property
    def positions(self) -> int: ...

    @property
    def vocab_size(self) -> int | None: ...


def complete_from(config: Config, recorded: Path | None = None) -> tuple[Config, DataSettings]:
    """The config with `model` and `data.tokenizer` from the model that `model.from` names; without one, as it is.

    Args:
        recorded: a checkpoint that the run goes on from. If it began from the same model, its config.yaml has the shape and its
            run folder the tokenizer, and the model itself is not needed any more.

    Returns:
        The config, and the data settings to build the data with: its `data`, the tokenizer where it lies on this machine.

    Raises:
        UserError: the model cannot be read, model.* settings contradict it, or it has fewer rows than the tokenizer has ids.
    """
    if begins_from_run(config):
        return with_source(config, recorded), config.data
    name = getattr(config.model, "from_", None)
    if name in (None, SCRATCH):
        return config, config.data
    shape = _recorded_shape(recorded, name)
    if shape is None or recorded is None:
        shape, tokenizer = _shape_and_tokenizer(name)
    else:
        tokenizer = recorded.resolve().parent.parent / TOKENIZER
    config = dataclasses.replace(config, model=_merged(config.model, shape, name))
    defaults = {field.name: field.default for field in dataclasses.fields(config.data)}
    if config.data.tokenizer not in (defaults["tokenizer"], name):
        _check_rows(config.model, config.data.tokenizer, config.data.tokenizer)
        return config, config.data
    if not tokenizer.is_file():
        raise UserError(f"model.from: {name} holds no {TOKENIZER}; set data.tokenizer to the one that it was trained with")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))
    _check_rows(config.model, name, str(tokenizer))
    return config, dataclasses.replace(config.data, tokenizer=str(tokenizer))


def _shape_and_tokenizer(name: str) -> tuple[dict[str, Any], Path]:
    run = find_run(name)
    if run is not None:
        return settings_of_run(run, name), folder_of_run(run) / TOKENIZER
    folder = find_folder(name)
    return read_settings(folder, name), folder / TOKENIZER


def _recorded_shape(recorded: Path | None, name: str) -> dict[str, Any] | None:
    if recorded is None:
        return None
    model = recorded_model(recorded)
    return {key: value for key, value in model.items() if key not in (*FREE, "from")} if model.get("from") == name else None


def _merged(ours: Any, shape: dict[str, Any], name: str) -> Any:
    """The settings, with the model's shape where the user left the default. Raises UserError for what contradicts it."""
    filled, against = {}, []
    for field in dataclasses.fields(ours):
        value, theirs = getattr(ours, field.name), shape.get(field.name, field.default)
        if field.name in FREE or value == theirs:
            continue
        fewer = field.name == "positions" and value < theirs
        more = field.name == "vocab_size" and value is not None and value > theirs
        if value == field.default:
            filled[field.name] = theirs
        elif not fewer and not more:
            against.append(f"model.{field.name} {value} (there {theirs})")
    if against:
        raise UserError(f"model.from: {name} has another shape than {', '.join(against)}; leave these out (model.positions may "
                        "be smaller, model.vocab_size larger)")
    return dataclasses.replace(ours, **filled)


def _check_rows(model: StartsFromModel, asked: str, tokenizer: str) -> None:
    """Raises UserError where the model has fewer rows than the tokenizer, which `data.tokenizer` calls `asked`, has ids."""
    ids, rows = load_tokenizer(tokenizer).vocab_size, model.vocab_size
    if rows is not None and ids > rows:
        raise UserError(f"model.from: {model.from_} has {rows} rows in its embedding table, fewer than the {ids} tokens of "
                        f"data.tokenizer {asked}; use the tokenizer it was trained with, or add rows with model.vocab_size "
                        f"{ids}")


def weights_from(model: ModelSettings) -> Read | None:
    """`read(name)`: the weights to start from, full fp32 CPU tensors of the shape that the `model` section has; None without
    `model.from`.

    Positions beyond `model.positions` are dropped. Rows added by a larger `model.vocab_size` are the mean of the others: zeros
    would outdo every true token where logits are far below zero, as GPT-2's are (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models").

    Raises:
        UserError: as of `open_huggingface`.
    """
    if not isinstance(model, StartsFromModel) or model.from_ in (None, SCRATCH):
        return None
    name = cast(str, model.from_)
    run = find_run(name, read=True)
    source: Read = weights_of_run(run) if run is not None else open_huggingface(name)[1]
    positions, rows = model.positions, model.vocab_size or 0

    def read(name: str) -> Tensor:
        value = source(name)
        if name == "position_embedding.weight":
            return value[:positions]
        if name in ("token_embedding.weight", "output.weight") and rows > len(value):
            return torch.cat([value, value.mean(dim=0, keepdim=True).expand(rows - len(value), -1)])
        return value

    return read


def keep_for_export(name: str, tokenizer: str, run: Path) -> None:
    """Copy the generation_config.json of the model that `model.from` names into the run folder, beside the tokenizer that it
    speaks of, if that is the one that `data.tokenizer` asks for."""
    begun = find_run(name)
    file = (folder_of_run(begun) if begun else find_folder(name)) / GENERATION_CONFIG
    if tokenizer == name and file.is_file():
        write_whole(run / GENERATION_CONFIG, file.read_bytes())
