"""Task files of one's own for lm-evaluation-harness, read as data: the harness itself would run the Python that they name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment
from yaml.constructor import ConstructorError

from genscale.errors import UserError
from genscale.reading import Unreadable, read_yaml

ELSEWHERE = "to run it, `genscale export` the model and give it to lm-eval itself"


def refuse_code(folder: Path) -> None:
    """Look through all task files below a folder and those that they include.

    Raises:
        UserError: one of them has a tag such as `!function`, by which the harness imports Python, or a metric that is not the
            harness's own and would be imported.
        Unreadable: one is not read, or is not valid YAML.
    """
    seen: set[Path] = set()
    for file in sorted(folder.rglob("*.yaml")):
        _check(file.resolve(), seen)


def _check(file: Path, seen: set[Path]) -> None:
    if file in seen or not file.is_file():
        return
    seen.add(file)
    try:
        content = read_yaml(file)
    except Unreadable as error:
        if not isinstance(error.__cause__, ConstructorError):
            raise Unreadable(f"{file} {error}") from None
        tag = error.__cause__
        raise UserError(f"--include_path: line {tag.problem_mark.line + 1} of {file}: {tag.problem}; task files are read "
                        f"as data, and Python that they name is not run; {ELSEWHERE}") from None
    for metric in _metrics(content):
        _check_metric(metric, file)
    included = content.get("include") if isinstance(content, dict) else None
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str):
            _check((file.parent / name).resolve(), seen)
        elif name is not None:
            raise UserError(f"--include_path: {file}: include: {name} is not the name of a file")


def _metrics(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict):
        if "metric" in content:
            yield content
        content = content.values()
    if not isinstance(content, str | bytes) and hasattr(content, "__iter__"):
        for part in content:
            yield from _metrics(part)


def _check_metric(metric: dict[str, Any], file: Path) -> None:
    from lm_eval.api.registry import metric_registry

    name = metric["metric"]
    if metric.get("hf_evaluate") or not isinstance(name, str) or name not in metric_registry:
        raise UserError(f"--include_path: {file}: metric {name} is not one of the harness's own, and would be imported; known "
                        f"are {', '.join(sorted(metric_registry))}; {ELSEWHERE}")


@contextlib.contextmanager
def templates_in_a_sandbox() -> Iterator[None]:
    """While it lasts, the harness's templates reach nothing but the document they are filled with. Raises UserError where one
    tries to."""
    import lm_eval.utils as harness

    plain = harness.env
    harness.env = SandboxedEnvironment(loader=plain.loader, undefined=plain.undefined,
                                       keep_trailing_newline=plain.keep_trailing_newline)
    harness.env.filters.update(plain.filters)
    try:
        yield
    except SecurityError as error:
        raise UserError(f"--tasks: a template reaches for Python ({error}); {ELSEWHERE}") from None
    finally:
        harness.env = plain
