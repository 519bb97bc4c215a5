"""The house's files agree with each other: what is imported is declared, what is declared is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import genscale

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE_OF = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
# Imported only where the user chose it, or only when present.
OPTIONAL = {"tensorboard", "transformers", "torchao", "lm_eval"}


def test_the_version_is_the_same_everywhere():
    found = [PROJECT["version"], genscale.__version__]
    found.append(re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1])
    found.append(re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1])
    assert len(set(found)) == 1, found


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower() for requirement in requirements}


def test_every_import_is_a_declared_dependency():
    found = set()
    for path in (ROOT / "genscale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    outside = {PACKAGE_OF.get(name, name) for name in found - set(sys.stdlib_module_names) - {"genscale", "_typeshed"}}
    assert outside - OPTIONAL <= declared(PROJECT["dependencies"])


def test_every_declared_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version], "a local build installs on some machines only"
    wanted = declared(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        wanted |= declared(extra)
    assert wanted <= {name.lower() for name in pins}


AMERICAN = re.compile(r"(?<![\w./-])(?:behaviors?|colored|centers?|centered|favor\w*|gray|neighbors?|labeled|modeling|catalog|"
                      r"initializ\w+|normaliz(?:ed?|es|ing|ation)|recogniz\w+|organiz\w+|synchroniz\w+|serializ\w+|tokeniz(?:ed?|es|ing|ation)|"
                      r"optimiz(?:ed?|es|ing|ation)|summariz\w+|analyz\w+|minimiz\w+|maximiz\w+|memoriz\w+|quantiz\w+|"
                      r"regulariz\w+|penaliz\w+|parametriz\w+)(?![\w(=.-])", re.IGNORECASE)
QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|```.*?```", re.DOTALL)
"""Code, names of settings and titles are spelt as they are."""


def prose() -> Iterator[tuple[str, str]]:
    """(where, text) of every docstring and comment of the package, and of every page."""
    for path in (ROOT / "genscale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value.value
        with path.open("rb") as file:
            yield from ((f"{path.relative_to(ROOT)}:{token.start[0]}", token.string)
                        for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT)
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        yield str(path.relative_to(ROOT)), re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return list(prose())


def test_one_spelling(texts):
    found = {f"{where}: {word}" for where, text in texts for word in AMERICAN.findall(QUOTED.sub("", text))}
    assert not found, "British spelling, please"


def test_no_docstring_begins_without_a_noun(texts):
    """`Of a run.` says whose, and not what. A sentence may begin so, where a clause follows."""
    assert not [f"{where}: {text}" for where, text in texts if re.match(r"Of [^:,.]{1,60}[.(;]", text)]
