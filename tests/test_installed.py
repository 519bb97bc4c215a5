"""What comes with genscale is found wherever it is installed and started from, and a config's paths are found beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from genscale import __version__
from genscale.families import FAMILIES
from genscale.settings.parser import parse_config
from genscale.settings.shipped import find_config

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/*/*.yaml"))
IN_A_WHEEL = ("pyproject.toml", "README.md", "LICENSE", "genscale", "configs", "launch")


def test_every_shipped_config_is_listed_and_runs_by_name(genscale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = genscale("configs").out.splitlines()
    lines = dict(line.split(None, 1) for line in listed[:listed.index("")])
    assert sorted(lines) == NAMES
    for name, described in lines.items():
        file = ROOT / "configs" / f"{name}.yaml"
        assert os.path.samefile(find_config(name), file)  # which test_configs.py reads
        assert described.removesuffix(" ...") in " ".join(line.strip("# ") for line in file.read_text().splitlines())
    assert max(map(len, listed[:len(lines)])) <= 140
    assert Path(parse_config(FAMILIES, ["--config", "gpt/demo"]).data.tokenizer).is_file()


def test_a_name_that_is_none_is_refused_with_the_nearest(genscale, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "cannot read 'gpt/demos'" in (said := genscale("train", "--config", "gpt/demos").message())
    assert said.endswith("(did you mean 'gpt/demo'?)")
    Path("gpt").mkdir()
    Path("gpt/demo").write_text("run: {name: mine}\n")  # a file of the user's own comes first
    assert parse_config(FAMILIES, ["--config", "gpt/demo"]).run.name == "mine"


def test_a_relative_path_is_looked_for_beside_the_config_first(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, names in ((there, ("both", "text", "bytes", "step-1", "model")), (here, ("both", "own"))):
        for name in names:
            (folder / name).mkdir(parents=True)
    monkeypatch.chdir(here)
    paths = {"source": ["text", "own", "someone/dataset", str(there / "own")], "validation_source": "both",
             "tokenizer": "bytes"}
    (there / "run.yaml").write_text(yaml.safe_dump({"run": {"resume": "step-1", "dir": "both"}, "model": {"from": "model"},
                                                    "data": {**paths, "cache": "both"}}))
    (there / "mixed.yaml").write_text("data: {sources: [{source: text, weight: 1}, {source: own, name: b}]}\n")
    file = "../there/run.yaml"
    config = parse_config(FAMILIES, ["--config", file])
    assert config.data.source == ["../there/text", "own", "someone/dataset", str(there / "own")]
    assert (config.data.validation_source, config.data.tokenizer) == ("../there/both", "bytes")
    assert (config.run.resume, config.model.from_) == ("../there/step-1", "../there/model")
    assert (config.run.dir, config.data.cache) == ("both", "both"), "what is written goes by the current folder"
    config = parse_config(FAMILIES, ["--config", file, "--data.validation_source", "both", "--data.tokenizer=text"])
    assert (config.data.validation_source, config.data.tokenizer) == ("both", "text"), "flags go by the current folder"
    config = parse_config(FAMILIES, ["--config", file, "--config", "../there/mixed.yaml"])
    assert config.data.sources == [{"source": "../there/text", "weight": 1}, {"source": "own", "name": "b"}]
    monkeypatch.chdir(there)
    assert parse_config(FAMILIES, ["--config", "run.yaml"]).data.validation_source == "both", "as it was written"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of the programs of an environment with genscale from a wheel, and of what it needs from this one's."""
    folder = tmp_path_factory.mktemp("installed")
    for name in IN_A_WHEEL:  # a copy, for the build writes beside what it builds, and takes in what it finds there
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    _done([*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "wheels", folder])
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    [wheel] = (folder / "wheels").glob("genscale-*.whl")
    _done([*pip, "--python", python, "install", *offline, wheel])
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def _done(command: list[object], **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, check=False,
                          timeout=240, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_a_wheel_the_demo_runs_in_an_empty_folder(installed, tmp_path):
    listed = _done([installed / "genscale", "configs"], cwd=tmp_path)
    assert str(installed.parent) in listed and str(ROOT) not in listed
    assert {line.split(None, 1)[0] for line in listed.split("\n\n")[0].splitlines()} == set(NAMES)
    few = ["--train.steps", 2, "--train.global_batch_size", 2, "--data.validation_blocks", 2, "--tracking.wandb", "disabled"]
    out = _done([installed / "genscale", "train", "--config", "gpt/demo", *few], cwd=tmp_path)
    assert "bits per byte" in out and (tmp_path / "runs" / "demo" / "checkpoints" / "step-00000002").is_dir()
    assert "accelerate launch --module genscale train" in out, "there is no train.py here"
    [packages] = (installed.parent / "lib").glob("python*/site-packages")
    assert (packages / "genscale" / "py.typed").is_file() and (packages / "genscale" / "launch" / "ddp.yaml").is_file()
    # A job of such an installation keeps a copy of the code with what its launcher reads.
    kept = "from pathlib import Path; from genscale.cluster.snapshot import take; print(take(Path('runs/job'), True).keep())"
    code = tmp_path / _done([installed / "python", "-c", kept], cwd=tmp_path).strip()
    assert (code / "launch" / "ddp.yaml").read_text() == (ROOT / "launch" / "ddp.yaml").read_text()
    assert _done([installed / "python", code, "--version"], cwd=tmp_path).strip() == __version__
