"""The tutorial of a family of one's own: its pieces are the files of docs/examples/vq_vae, and these, installed, keep the
promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "docs" / "examples" / "vq_vae"
PIECES = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def solid(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.splitlines() if line.strip()]


def test_the_page_shows_the_files_whole_and_in_order():
    page = (ROOT / "docs/tutorials/family.md").read_text()
    shown: dict[str, str] = {}
    for title, text in PIECES.findall(page):
        shown[title] = shown.get(title, "") + text
    files = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.*") if path.suffix in (".py", ".toml", ".yaml")]
    assert sorted(shown) == sorted(files) and not re.findall(r"^```(?:python|toml|yaml)$", page, re.MULTILINE)
    for name, text in shown.items():
        assert solid(text) == solid((PACKAGE / name).read_text()), name


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> str:
    """A PYTHONPATH with the package, installed by pip."""
    folder = tmp_path_factory.mktemp("vq_vae")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "runs"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", folder / "installed", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return f"{ROOT}:{folder / 'installed'}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_package_keeps_the_promise(installed, genscale_process, tmp_path):
    done = genscale_process("check-family", "vq_vae", PYTHONPATH=installed, cwd=tmp_path, timeout=800)
    assert done.code == 0, done.out + done.err
    assert "family vq_vae keeps the promise" in done.out
    assert "refused" not in done.out and "left out" not in done.out, done.out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("zero2", "zero3"))])
def test_it_trains_with_weights_in_bf16(strategy, installed, genscale_group, tmp_path):
    done = genscale_group("train", "--config", PACKAGE / "digits.yaml", "--parallel.strategy", strategy, "--train.precision",
                          "bf16", "--train.steps", 4, "--run.dir", tmp_path, PYTHONPATH=installed, cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "digits" / "samples").glob("*.png"))) == 1
