"""An installed package's family: a real package, installed by pip into a folder of its own, seen by every verb."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genscale.families import FAMILIES
from genscale.inspection.config_check import check_config
from genscale.settings.parser import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tests" / "plugin_package"
CONFIG = """
run: {{name: rings, dir: "{folder}"}}
model: {{family: rings, width: 8}}
data: {{radius: 2.0, workers: 0}}
train: {{steps: 4, global_batch_size: 8, log_every: 1, precision: fp32, checkpoint_every: 2}}
tracking: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that the package is installed in."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "source")  # a build writes into it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", folder / "installed", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "installed"


@pytest.fixture
def seen(installed, monkeypatch) -> Path:
    """As `installed`, in this process."""
    monkeypatch.syspath_prepend(installed)
    return installed


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "rings.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path / "rings.yaml"


def test_a_packages_family_is_trained_recorded_and_named_where_it_is_missing(seen, config, tmp_path, genscale, monkeypatch):
    listed = {line.split()[0]: line for line in genscale("families").out.splitlines()}
    assert "genscale-rings  1.2.0" in listed["rings"] and listed["rings"].endswith("A flow that learns points on a ring")
    assert "cannot be loaded (ModuleNotFoundError: No module named 'no_such_library')" in listed["broken_rings"]
    assert "Width of the hidden layer." in genscale("train", "--model.family", "rings", "--help").out

    check_config(load_config(FAMILIES, config), 4)  # as `genscale slurm submit` does
    done = genscale("train", "--config", config)
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "rings" / "checkpoints" / "step-00000004" / "manifest.json").read_text())["about"]
    assert about["family"] == {"name": "rings", "package": "genscale-rings", "version": "1.2.0"}
    assert genscale("evaluate", tmp_path / "rings").code == 0
    manifest = tmp_path / "rings" / "checkpoints" / "step-00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"1.2.0"', '"1.1.0"'))
    other = genscale("train", "--config", config, "--train.steps", 5)
    assert "was made with package genscale-rings==1.1.0, and genscale-rings==1.2.0 is used" in other.err, other.err
    broken = genscale("train", "--config", config, "--model.family", "broken_rings").message()
    assert broken.startswith("model.family: 'broken_rings' of package genscale-rings==1.2.0 cannot be loaded (Mod")

    monkeypatch.undo()  # the package is gone
    for arguments in (["train", "--config", config, "--train.steps", 8], ["evaluate", tmp_path / "rings"]):
        message = genscale(*arguments).message()
        assert "model.family: 'rings' is not one of gpt, " in message
        assert message.endswith("was made with that of package genscale-rings==1.2.0: pip install genscale-rings==1.2.0")


@pytest.mark.slow
def test_the_processes_of_a_run_see_it(installed, config, tmp_path, genscale_process):
    path = f"{ROOT}:{installed}"
    done = genscale_process("train", "--processes", 2, "--config", config, PYTHONPATH=path)
    assert done.code == 0, done.err
    again = genscale_process("train", "--processes", 2, "--config", config, "--train.steps", 6, "--parallel.strategy", "fsdp2",
                             PYTHONPATH=path)
    assert again.code == 0 and "continuing from" in again.err + again.out, again.err
