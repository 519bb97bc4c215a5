"""Opening a Hugging Face model: a folder, or a name on the hub."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from genscale.errors import UserError, nearest
from genscale.families.gpt.settings import GPTSettings, resolved
from genscale.interop.architectures import CLASSES, settings_of
from genscale.interop.weights import HEAD, Read, SafetensorsFolder, has_a_head_of_its_own, read_weights
from genscale.reading import Unreadable, read_json

log = logging.getLogger("genscale")
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
# Whatever else a repository holds (pickles, other formats) is not fetched.
WANTED = ["*.json", "*.jinja", "*.safetensors"]


def find_folder(name: str) -> Path:
    """The local folder that `name` means: itself, or the copy of a hub repository in Hugging Face's cache, fetched if need be.

    Raises:
        UserError: no such folder, no such repository, no access to it, or no network.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.match(name):
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"model.from: there is no folder {name}{nearest(folder.name, siblings)}; give a Hugging Face folder "
                        "(config.json, *.safetensors, tokenizer.json), the name of a model on the hub, or a run folder")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    # Every rank may come here: the hub's client locks each file, so that one fetches and the others wait.
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except errors.GatedRepoError:
        raise UserError(f"model.from: the hub's {name} asks for consent: accept its terms on https://huggingface.co/{name}, "
                        "then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"model.from: there is no folder {name} here, and the hub has no such model (or it is private: "
                        "`hf auth login`)") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model.from: there is no folder {name} here, it is not in the hub's cache, and the hub cannot be "
                        f"reached ({reason}); fetch it where there is a network with `hf download {name} --local-dir DIR`, "
                        "copy DIR here and set model.from to it") from None


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """The fields of `GPTSettings` that the folder comes to. Raises UserError."""
    return _as_stored(settings_of(_read_config(folder, name), name), SafetensorsFolder(folder, name))


def _as_stored(fields: dict[str, Any], files: SafetensorsFolder) -> dict[str, Any]:
    """What config.json says, but for a head of its own beside the token embedding: it is not shared then, as in transformers
    (`tie_weights` of modeling_utils.py)."""
    try:
        resolved(GPTSettings(**fields))  # before anything is made of its sizes
    except UserError as error:
        raise UserError(f"model.from: {files.name}: {CONFIG} describes no GPT: {error}") from None
    return {**fields, "tied": fields["tied"] and not has_a_head_of_its_own(fields["preset"], files)}


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = read_json(folder / CONFIG)
    except FileNotFoundError:
        raise UserError(f"model.from: {name} holds no {CONFIG}; give the folder that transformers' save_pretrained wrote, or a "
                        "run folder") from None
    except (OSError, Unreadable) as error:
        raise UserError(f"model.from: {name}: {CONFIG} cannot be read ({error}); copy the folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"model.from: {name}: {CONFIG} is a {type(content).__name__}, not an object; copy the folder again")
    return content


def open_huggingface(name: str) -> tuple[dict[str, Any], Read]:
    """A GPT-2, Llama or Qwen3 in a folder or on the hub, no weight of it loaded yet. Says in a line what of it is not heeded.

    Returns:
        The fields of `GPTSettings` (with `vocab_size`), and `read(name)`: our parameter of that name, full, fp32, on the CPU.

    Raises:
        UserError: no such model, another architecture, or files that are missing, damaged or at odds with config.json.
    """
    folder = find_folder(name)
    content = _read_config(folder, name)
    said = settings_of(content, name)
    files = SafetensorsFolder(folder, name)
    fields = _as_stored(said, files)
    if content.get("auto_map"):
        log.warning("model.from: %s names code of its own (auto_map), which is not run; it is read as a %s", name,
                    CLASSES[fields["preset"]])
    if fields["tied"] != said["tied"]:
        log.warning("model.from: %s says tie_word_embeddings true, and holds another %s; the two are read as they are, untied, "
                    "as transformers does", name, HEAD)
    return fields, read_weights(fields["preset"], resolved(GPTSettings(**fields)), fields["vocab_size"], files)
