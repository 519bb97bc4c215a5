"""Import arrows point down the list of rooms, never in a circle, and only parallel/ knows how a step is spread."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A row may import itself and the rows below it. The package's own __init__ stands at the foot: importing any room runs it.
ORDER = [
    {"cli", "__main__", "verbs", "api"}, {"cluster"}, {"planning"}, {"inspection"}, {"testing"}, {"training"}, {"supervise"},
    {"interop"}, {"checkpoint"}, {"tracking"}, {"parallel"}, {"families"}, {"evaluation"}, {"objectives"}, {"rewards"},
    {"data"}, {"models"}, {"hook"}, {"settings"}, {"rng"}, {"plugins"}, {"errors", "exit_codes", "reading", "writing"},
    {"masking", "printable"}, {"__init__"}, {"process_settings"},
]  # fmt: skip
STRATEGIES = {"single", "ddp", "zero1", "zero2", "zero3", "fsdp2"}
SPREADING = ("accelerate", "deepspeed", "torch.distributed.fsdp", "torch.distributed._composable", "torch.nn.parallel")
KNOWS_STRATEGIES = {"parallel", "settings", "cli"}


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by dotted name; a folder's name stands for its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, name: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, at the top or inside functions; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: (None if is_package else -1)] if node.level else []
            base = base[: len(base) - node.level + 1] if node.level else base
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def known(target: str, names: dict[str, Path]) -> str | None:
    """The module of the package that an import of `target` reads: itself, or the one that defines the imported name."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def row(module: str) -> int | None:
    return next((index for index, rooms in enumerate(ORDER) if room(module) in rooms), None)


def compared_strategies(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every decision on a strategy's name: ==, in, match, startswith."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            parts = list(node.args)
        else:
            continue
        texts = {leaf.value for part in parts for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)}
        prefixes = {"zero", "fsdp"} if isinstance(node, ast.Call) else set()
        yield from ((node.lineno, text) for text in texts if text in STRATEGIES | prefixes)


def violations(package: Path) -> list[str]:
    """One line for every breach of the rules in the package."""
    names, found, graph = modules(package), [], {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        where = path.relative_to(package.parent)
        graph[name] = set()
        if row(name) is None:
            found.append(f"{where}: room '{room(name)}' has no place in the order of rooms")
            continue
        for line, target in imports(tree, name, path.name == "__init__.py"):
            module = known(target, names)
            if module:
                graph[name].add(module)
                if row(module) is not None and row(module) < row(name):
                    found.append(f"{where}:{line}: imports {module}, which stands above it")
            if room(name) != "parallel" and any(f"{target}.".startswith(f"{package_}.") for package_ in SPREADING):
                found.append(f"{where}:{line}: imports {target}; only parallel/ may")
        if room(name) not in KNOWS_STRATEGIES:
            for line, text in compared_strategies(tree):
                found.append(f"{where}:{line}: decides on the strategy '{text}'; only parallel/ may")
    return found + [f"import circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import circles, also those that an import inside a function defers. (Importing a.b runs a's `__init__`: not counted.)"""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name] - {name}):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def test_the_house_keeps_its_rules():
    assert violations(ROOT / "genscale") == []


FULLY_SHARD = "from torch.distributed.fsdp import fully_shard"
# What is planted, the file it is planted in, another file that must exist, and what the report says.
PLANTED = [
    ("from genscale.training.loop import Loop", "data/text.py", "training/loop.py", ".py:1: imports genscale.training.loop"),
    ("def f():\n    import genscale.data.text", "rng.py", "data/text.py", "rng.py:2: imports genscale.data.text"),
    ("from ..data import text", "models/gpt.py", "data/text.py", "imports genscale.data.text"),
    ("from genscale import errors", "__init__.py", "errors.py", "imports genscale.errors"),
    ("from . import b", "data/a.py", "data/b.py", "genscale.data.a -> genscale.data.b -> genscale.data.a"),
    ("", "utils/misc.py", None, "room 'utils' has no place"),
    ("import deepspeed.ops", "training/loop.py", None, "imports deepspeed.ops; only parallel/ may"),
    ("from accelerate import Accelerator", "tracking/w.py", None, "imports accelerate.Accelerator; only parallel/ may"),
    (FULLY_SHARD, "models/gpt.py", None, "imports torch.distributed.fsdp.fully_shard; only parallel/ may"),
    ("if strategy == 'zero3': pass", "training/loop.py", None, "decides on the strategy 'zero3'"),
    ("x = s in ('ddp', 'other')", "training/loop.py", None, "decides on the strategy 'ddp'"),
    ("match s:\n    case 'fsdp2': pass", "training/loop.py", None, "decides on the strategy 'fsdp2'"),
    ("x = s.startswith('zero')", "training/loop.py", None, "decides on the strategy 'zero'"),
]


def plant(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "genscale" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "genscale"


@pytest.mark.parametrize(("text", "file", "other", "message"), PLANTED)
def test_a_planted_breach_is_found(text, file, other, message, tmp_path):
    others = {other: "import genscale.data.a" if other == "data/b.py" else ""} if other else {}
    found = violations(plant(tmp_path, {**others, file: text}))
    assert len(found) == 1
    assert message in found[0]


def test_what_is_allowed_is_not_reported(tmp_path):
    package = plant(tmp_path, {
        "errors.py": "", "rng.py": "", "data/lanes.py": "from genscale import errors\nimport genscale.rng",
        "parallel/zero.py": "import deepspeed\nif s == 'zero3': pass", "training/loop.py": "from genscale.parallel import zero",
    })  # fmt: skip
    assert violations(package) == []
