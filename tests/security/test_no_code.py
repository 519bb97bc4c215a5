"""Files that carry code are refused or read as data: a planted payload that would leave a mark never does."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from genscale.checkpoint.checkpoints import sha256_of
from genscale.errors import UserError
from genscale.evaluation.inception import InceptionFeatures

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def payload(mark: Path) -> Iterator[bytes]:
    """A pickle that leaves the mark, as seen by unpickling it once; none may be there when the test ends."""
    content = pickle.dumps({"weight": Payload(mark)})
    pickle.loads(content)
    mark.rmdir()
    yield content
    assert not mark.exists(), "the payload was executed"


@pytest.fixture
def zipped(mark: Path) -> bytes:
    """The same as torch.save writes it."""
    file = io.BytesIO()
    torch.save({"weight": Payload(mark)}, file)
    return file.getvalue()


# --- configs -----------------------------------------------------------------------------------------------------------

CALLS = ["!!python/object/apply:os.mkdir [MARK]", "!!python/object/new:os.mkdir [MARK]", "!!python/name:os.mkdir",
         "!!python/module:antigravity", "{class_path: os.mkdir, init_args: {path: MARK}}", "{__class__: os.mkdir, path: MARK}"]
PLACES = ["run.name", "data.filters", "data.sources", "optimizer.lr_of", "model", "train.steps"]


@pytest.mark.parametrize("call", [pytest.param(call, marks=() if "apply" in call or "class_path" in call else pytest.mark.slow)
                                  for call in CALLS])
def test_a_config_cannot_call(call, genscale, tiny_config, payload, mark) -> None:
    text = tiny_config.read_text()
    for place in PLACES:
        section, _, key = place.partition(".")
        value = call.replace("MARK", str(mark))
        planted = f"{section}: {value}\n" if not key else f"{section}: {{{key}: {value}}}\n"
        rest = {name: values for name, values in yaml.safe_load(text).items() if name != section}
        file = tiny_config.with_name("planted.yaml")
        file.write_text(yaml.safe_dump(rest) + planted)
        assert genscale("train", "--config", file).message()
        assert genscale("train", "--config", tiny_config, f"--{place}={value}").message()


def test_a_config_cannot_import(genscale, tiny_config, tmp_path, monkeypatch, mark, payload) -> None:
    (tmp_path / "planted_module.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = tiny_config.read_text()
    for value in ("{class_path: planted_module.Thing}", "{a: [{class_path: planted_module.Thing}]}", "planted_module.Thing"):
        for key in ("filters", "sources"):
            tiny_config.write_text(text.replace("data:\n", f"data:\n  {key}: {value}\n"))
            assert genscale("train", "--config", tiny_config).message_of_run()
            tiny_config.write_text(text)
            assert genscale("train", "--config", tiny_config, f"--data.{key}={value}").message_of_run()


def test_variables_of_the_environment_are_not_put_in(refuse, monkeypatch, tmp_path) -> None:
    """A stranger's config must not be able to send a token to an address of his."""
    monkeypatch.setenv("HF_TOKEN", "hf_PlantedHubToken0123456789")
    monkeypatch.setenv("PLANTED", str(tmp_path))
    for value in ("${PLANTED}/text.txt", "$PLANTED/text.txt", "${oc.env:PLANTED}/text.txt"):
        assert f"data.source={value}: there is no such file" in refuse("--data.source", value)


# --- checkpoints, weights, tokenizers, caches, data ---------------------------------------------------------------------

def test_a_checkpoint_of_pickles_is_refused(copied, genscale, tiny_config, payload, zipped) -> None:
    """Even where the manifest vouches for it."""
    for content in (payload, zipped):
        for folder in (copied / "checkpoints").iterdir():
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in manifest["files"]:
                if name.endswith(".safetensors"):
                    (folder / name).write_bytes(content)
                    manifest["files"][name] = {"bytes": len(content), "sha256": sha256_of(folder / name)}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        for words in (["train", "--config", tiny_config, "--train.steps", 8], ["sample", copied, "--tokens", 2],
                      ["checkpoint", "digest", copied]):
            assert "cannot be read" in genscale(*words).message_of_run()


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_a_checkpoint_whose_state_is_a_pickle_is_refused(name, copied, genscale, tiny_config, payload) -> None:
    for folder in (copied / "checkpoints").iterdir():
        (folder / name).write_bytes(payload)
    assert "damaged" in genscale("train", "--config", tiny_config, "--train.steps", 8).message_of_run()


def test_a_model_of_pickles_and_python_is_refused(refuse, tmp_path, mark, payload, zipped) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Model: pass\nclass Tokenizer: pass\nclass Config: pass\n"
    (folder / "modeling_planted.py").write_text(code)
    maps = {"AutoModelForCausalLM": "modeling_planted.Model", "AutoConfig": "modeling_planted.Config"}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "auto_map": maps, "n_layer": 1, "n_head": 2,
              "n_embd": 32, "n_positions": 32, "vocab_size": 256, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_planted.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for file, content in (("pytorch_model.bin", zipped), ("model.safetensors", payload), ("model.safetensors", zipped)):
        (folder / file).write_bytes(content)
        said = refuse("--model.from", folder)
        assert said.startswith(("model.from", "data.tokenizer")), said
        (folder / file).unlink()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "planted"}))
    assert refuse("--model.from", folder).startswith("model.from: ")


def test_a_tokenizer_of_pickles_and_python_is_refused(refuse, tmp_path, mark, payload) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(payload)
    (folder / "tokenization_planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_planted.T", None]}}))
    for value in (folder, folder / "tokenizer.json"):
        assert refuse("--data.tokenizer", value).startswith("data.tokenizer=")


def test_a_token_cache_of_pickles_is_refused_or_read_as_bytes(genscale, tiny_config, tiny_run, tmp_path, payload) -> None:
    cache = tmp_path / "cache"
    command = ["train", "--config", tiny_config, "--data.cache", cache, "--train.steps"]
    assert genscale(*command, 2).code == 0
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(payload)
    assert genscale(*command, 4).message_of_run().startswith(f"data.cache={cache}: ")


def object_arrays(mark: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("images.npy", "labels.npy"):
            array = io.BytesIO()
            np.save(array, np.array([Payload(mark)] * 64, dtype=object), allow_pickle=True)
            archive.writestr(name, array.getvalue())
    return file.getvalue()


def test_data_of_pickles_is_refused(genscale, refuse, tmp_path, mark, payload, zipped) -> None:
    images = {"model": {"family": "vae"}, "data": {"size": 16, "channels": 1}, "train": {"steps": 1, "global_batch_size": 8},
              "run": {"dir": str(tmp_path / "runs")}, "tracking": {"wandb": "disabled"}}
    config = tmp_path / "images.yaml"
    config.write_text(yaml.safe_dump(images))
    for number, content in enumerate((object_arrays(mark), payload, zipped)):
        for suffix in (".npz", ".parquet", ".tar", ".png"):
            (tmp_path / f"{number}").mkdir(exist_ok=True)
            file = tmp_path / f"{number}" / f"data{suffix}"
            file.write_bytes(content)
            source = file if suffix != ".png" else file.parent
            said = genscale("train", "--config", config, "--data.source", source)
            assert said.message_of_run().startswith("data.source="), said.err
            file.unlink()
        for suffix in (".jsonl", ".parquet", ".jsonl.gz"):
            file = tmp_path / f"text{suffix}"
            file.write_bytes(content)
            assert refuse("--data.source", file).startswith("data.source=")


def test_a_folder_with_a_loading_script_is_read_as_data(genscale, tiny_config, tiny_text, tmp_path, mark, payload) -> None:
    """As a hub dataset may hold one: <folder>/<folder>.py."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "planted.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (folder / "data.pkl").write_bytes(payload)
    shutil.copy(tiny_text, folder)
    assert genscale("train", "--config", tiny_config, "--data.source", folder, "--train.steps", 1).code == 0


def test_weights_of_the_scoring_networks_are_not_unpickled(tmp_path, payload, zipped, monkeypatch) -> None:
    for content in (payload, zipped):
        file = tmp_path / "weights.pth"
        file.write_bytes(content)
        with pytest.raises(UserError, match="is no file of PyTorch weights"):
            InceptionFeatures(str(file))


# --- the code itself ----------------------------------------------------------------------------------------------------

FORBIDDEN = {"eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen", "pickle.load",
             "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.load",
             "marshal.loads", "torch.hub.load", "shelve.open"}
ALLOWED = {("data/transports.py", "pickle.loads"),  # of what it has pickled in the same line: whether an error can travel
           ("__init__.py", "importlib.import_module")}  # of the modules of its own table


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def dangers(path: Path, name: str) -> list[str]:
    """Calls that could execute what a file holds."""
    found = []
    for function, call in calls(ast.parse(path.read_text())):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if function in FORBIDDEN and (name, function) not in ALLOWED:
            found.append(f"{name}: {function}")
        if function == "torch.load" and options.get("weights_only") != "True":
            found.append(f"{name}: torch.load without weights_only=True")
        if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
            found.append(f"{name}: {function} with allow_pickle or shell")
        if "trust_remote_code" in options:
            found.append(f"{name}: {function} with trust_remote_code")
    if "trust_remote_code" in path.read_text():
        found.append(f"{name}: names trust_remote_code")
    return found


def test_nothing_in_the_package_executes_what_a_file_holds() -> None:
    found = [danger for path in sorted((ROOT / "genscale").rglob("*.py"))
             for danger in dangers(path, path.relative_to(ROOT / "genscale").as_posix())]
    assert found == []


@pytest.mark.parametrize("line", [
    "import pickle; pickle.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
    "AutoModel.from_pretrained(n, trust_remote_code=flag)", "subprocess.run(c, shell=True)", "yaml.load(t, Loader=yaml.Loader)",
    "options = {'trust_remote_code': True}", "eval(text)",
])
def test_such_a_call_would_be_found(line: str, tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(line)
    assert dangers(file, "planted.py")
