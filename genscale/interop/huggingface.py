"""Opening a Hugging Face model: a folder, or a name on the hub."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from genscale.errors import UserError, nearest
from genscale.interop.architectures import settings_of
from genscale.interop.weights import Read, SafetensorsFolder, read_weights
from genscale.models.gpt_settings import GPTSettings, resolved

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
                        "(config.json, *.safetensors, tokenizer.json) or the name of a model on the hub")
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
    """The fields of `GPTSettings` that the folder's config.json comes to. Raises UserError."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        is_run = (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file()
        advice = (f"it is a genscale run: write a Hugging Face folder with `genscale export {shlex.quote(name)} --out DIR` "
                  "first" if is_run else "give the folder that transformers' save_pretrained wrote")
        raise UserError(f"model.from: {name} holds no {CONFIG}; {advice}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.from: {name}: {CONFIG} cannot be read ({error}); copy the folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"model.from: {name}: {CONFIG} is a {type(content).__name__}, not an object; copy the folder again")
    return settings_of(content, name)


def open_huggingface(name: str) -> tuple[dict[str, Any], Read]:
    """A GPT-2, Llama or Qwen3 in a folder or on the hub, no weight of it loaded yet.

    Returns:
        The fields of `GPTSettings` (with `vocab_size`), and `read(name)`: our parameter of that name, full, fp32, on the CPU.

    Raises:
        UserError: no such model, another architecture, or files that are missing, damaged or at odds with config.json.
    """
    folder = find_folder(name)
    fields = read_settings(folder, name)
    settings = resolved(GPTSettings(**fields))
    return fields, read_weights(fields["preset"], settings, fields["vocab_size"], SafetensorsFolder(folder, name))
