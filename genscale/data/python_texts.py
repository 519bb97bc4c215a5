"""Text that every Python brings: CPython's language reference and its standard library. Nothing is downloaded."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

from genscale.errors import UserError

DOCS, STDLIB = "python-docs", "python-stdlib"
NO_PART = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
"""Folders within that of the standard library: of its tests, of what was installed besides, and of tables and texts that a
program wrote, which are learnt in no time and would make the loss look better than the code is known."""
OF_THE_MACHINE = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
"""How the names of files and folders begin that say how and where a Python was built, or what its owner added."""


def language_reference() -> list[str]:
    """The topics of Python's own help, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def standard_library() -> list[str]:
    """The modules of the standard library, in the order of their paths: the same texts for one version of CPython.

    Raises:
        UserError: this Python has them in no folder, or without their sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [(path.relative_to(root), path) for path in root.rglob("*.py") if path.is_file()]
    texts = [_text(path) for relative, path in sorted(found)
             if not NO_PART & set(relative.parts) and not any(part.startswith(OF_THE_MACHINE) for part in relative.parts)]
    if not any(texts):
        raise UserError(f"data.source={STDLIB}: Python {platform.python_version()} has no sources of its standard library in "
                        f"{root}; give a file or folder of text, or {DOCS}")
    return [text for text in texts if text]


def _text(path: Path) -> str:
    """Text of a module; empty where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


TEXTS: dict[str, Callable[[], list[str]]] = {DOCS: language_reference, STDLIB: standard_library}
"""The sources of that kind by name, each with its documents."""


def version_of(names: tuple[str, ...]) -> dict[str, str]:
    """What a plan says of the Python that its text is of; nothing where none of the sources is such a text.

    The language reference has its content alone, as checkpoints of earlier versions know it.
    """
    return {"python": platform.python_version()} if STDLIB in names else {}
