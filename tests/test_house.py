"""The house's files agree with each other: what is imported is declared, what is declared is pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

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
    outside = {PACKAGE_OF.get(name, name) for name in found - set(sys.stdlib_module_names) - {"genscale"}}
    assert outside - OPTIONAL <= declared(PROJECT["dependencies"])


def test_every_declared_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version], "a local build installs on some machines only"
    wanted = declared(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        wanted |= declared(extra)
    assert wanted <= {name.lower() for name in pins}
