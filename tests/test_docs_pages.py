"""README and docs/: every file and name that is named is there, code that is shown of a file stands in it, the reference is
up to date, the site is built."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import genscale
from genscale.families import FAMILIES
from genscale.hook import HOOKS
from genscale.settings.parser import config_parser, parse_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILES = re.compile(r"(?<![\w/])(?:benchmarks|configs|docs|genscale|launch|slurm|tests)/[\w./*-]*\w")


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_every_file_that_is_named_is_there():
    missing = [f"{page.relative_to(ROOT)}: {name}" for page in PAGES if page.parent.name != "reference"
               for name in FILES.findall(" ".join(re.findall(r"`([^`\n]+)`", page.read_text())))
               if "/<" not in name and not list(ROOT.glob(name))]
    assert not missing


def test_every_python_name_that_is_named_is_there():
    named = {name for page in PAGES for name in re.findall(r"`(genscale(?:\.\w+)+)", page.read_text())}
    assert len(named) > 10
    assert not [name for name in named - {HOOKS.group} if not is_there(name)]


def is_there(name: str) -> bool:
    """Whether a dotted name is a public one, a module, or in a module."""
    found: object = genscale
    for number, part in enumerate(parts := name.split(".")[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(["genscale", *parts][:number]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def test_every_setting_that_is_named_is_one():
    known = set().union(*(config_parser(FAMILIES, name).keys() for name in FAMILIES))
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    named = re.compile(rf"`(?:--)?((?:{sections})\.[a-z]\w*)(?=[` :=])")
    files = ("run.yaml", "model.safetensors", "train.py", "train.npz")
    wrong = {f"{page.relative_to(ROOT)}: {key}" for page in PAGES for key in named.findall(page.read_text())
             if key not in known and key not in files}
    assert not wrong


def test_every_config_that_is_shown_is_one(tmp_path):
    shown = [text for page in PAGES for text in blocks(page, "yaml")]
    assert shown
    for number, text in enumerate(shown):
        (file := tmp_path / f"{number}.yaml").write_text(text)
        parse_config(FAMILIES, ["--config", str(file)])


SHOWN = [("docs/tutorials/own-network.md", "docs/examples/*.py"),
         ("docs/how-to/plug-ins.md", "tests/plugin_package/genscale_rings/*.py"),
         ("docs/how-to/test-your-own.md", "genscale/testing/*.py"),
         ("docs/how-to/add-a-family.md", "genscale/{models/*,families/points/__init__,objectives/base}.py")]
"""Pages, and the files that their Python is of."""


@pytest.mark.parametrize(("page", "files"), SHOWN)
def test_the_code_that_is_shown_is_that_of_its_file(page, files):
    """Word for word, wherever it is indented there, and as an example of a docstring too."""
    head, _, rest = files.partition("{")
    choices, _, tail = rest.partition("}")
    patterns = [f"{head}{choice}{tail}" for choice in choices.split(",")] if rest else [files]
    written = [plain(path.read_text()) for pattern in patterns for path in ROOT.glob(pattern)]
    shown = blocks(ROOT / page, "python")
    assert shown
    missing = [block for block in shown if not any(plain(block) in text for text in written)]
    assert not missing


def plain(code: str) -> str:
    """Code without its indentation, the signs of a docstring's example, and lines without a word."""
    lines = (re.sub(r"^(>>>|\.\.\.) ?", "", line.strip()).strip() for line in code.splitlines())
    return "\n".join(line for line in lines if line)


def test_the_lines_of_python_are_the_same_on_both_pages():
    assert blocks(ROOT / "README.md", "python") == blocks(ROOT / "docs/how-to/python.md", "python")[:1]


def test_the_reference_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/reference/generate.py")
    generate = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = generate  # dataclasses look their module up
    try:
        spec.loader.exec_module(generate)
        written = generate.pages()
    finally:
        del sys.modules["generate"]
    for name, text in written.items():
        assert (ROOT / "docs/reference" / name).read_text() == text, f"{name}: run python docs/reference/generate.py"


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_000


@pytest.mark.parametrize(("page", "least"), [("README.md", 10), ("CONTRIBUTING.md", 3)])
def test_the_links_of_a_page_at_the_top_lead_somewhere(page, least):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert len(links) > least and not [link for link in links if not (ROOT / link).exists()]


def test_the_site_is_built_without_a_warning(tmp_path):
    """A page that no link or menu reaches, a link or an anchor that leads nowhere: all are errors."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
                           timeout=120)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "reference" / "settings.html").is_file()
