"""Task files of one's own for lm-evaluation-harness, read as data: the harness itself would run the Python that they name."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from yaml.constructor import ConstructorError

from genscale.errors import UserError
from genscale.reading import Unreadable, read_yaml

TEMPLATE_SECONDS = 5.0
"""For one document; templates of tasks take microseconds."""
LARGEST = 10_000_000
ELSEWHERE = "to run it, `genscale export` the model and give it to lm-eval itself"


def refuse_code(folder: Path) -> None:
    """Look through all task files below a folder and those that they include.

    Raises:
        UserError: one of them has a tag such as `!function`, by which the harness imports Python, or a metric that is not the
            harness's own and would be imported; one includes a file from outside the folder, or is no plain file.
        Unreadable: one is not read, or is not valid YAML.
    """
    seen: set[Path] = set()
    for file in sorted(folder.rglob("*.yaml")):
        if not file.is_file() and not file.is_dir():  # a named pipe, for which the harness would wait
            raise UserError(f"--include_path: {file} is no plain file; remove it")
        _check(file.resolve(), seen, folder.resolve())


def _check(file: Path, seen: set[Path], folder: Path) -> None:
    if file in seen or not file.is_file():
        return
    seen.add(file)
    try:
        content = read_yaml(file)
    except Unreadable as error:
        if not isinstance(error.__cause__, ConstructorError):
            raise Unreadable(f"{file} {error}") from None
        tag = error.__cause__
        assert tag.problem_mark is not None  # as of all that is read from a text
        raise UserError(f"--include_path: line {tag.problem_mark.line + 1} of {file}: {tag.problem}; task files are read "
                        f"as data, and Python that they name is not run; {ELSEWHERE}") from None
    for metric in _metrics(content, set()):
        _check_metric(metric, file)
    included = content.get("include") if isinstance(content, dict) else None
    for name in included if isinstance(included, list) else [included]:
        if isinstance(name, str):
            included_file = (file.parent / name).resolve()
            if not included_file.is_relative_to(folder):
                raise UserError(f"--include_path: {file}: include: {name} leads out of {folder}; copy it there, or set "
                                "--include_path to a folder that holds both")
            _check(included_file, seen, folder)
        elif name is not None:
            raise UserError(f"--include_path: {file}: include: {name} is not the name of a file")


def _metrics(content: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
    """Mappings that name a metric; what aliases stand for is looked at once."""
    if id(content) in seen:
        return
    if isinstance(content, dict | list):
        seen.add(id(content))
    if isinstance(content, dict):
        if "metric" in content:
            yield content
        content = content.values()
    if not isinstance(content, str | bytes) and hasattr(content, "__iter__"):
        for part in content:
            yield from _metrics(part, seen)


def _check_metric(metric: dict[str, Any], file: Path) -> None:
    from lm_eval.api.registry import metric_registry

    name = metric["metric"]
    if metric.get("hf_evaluate") or not isinstance(name, str) or name not in metric_registry:
        raise UserError(f"--include_path: {file}: metric {name} is not one of the harness's own, and would be imported; known "
                        f"are {', '.join(sorted(metric_registry))}; {ELSEWHERE}")


class TooMuch(TemplateError):
    """A template that does not come to an end, or makes what no memory holds."""


class _Template(Template):
    def render(self, *arguments: Any, **variables: Any) -> str:
        if threading.current_thread() is not threading.main_thread():
            return super().render(*arguments, **variables)
        before = signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
        try:
            return super().render(*arguments, **variables)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _give_up(*_: object) -> None:
    raise TooMuch(f"it does not come to an end within {TEMPLATE_SECONDS:g} s")


class _Sandbox(SandboxedEnvironment):
    template_class = _Template
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * abs(right) if operator == "**" else 0
        else:
            times, repeated = (left, right) if isinstance(left, int) else (right, left)
            size = len(repeated) * abs(times) if isinstance(times, int) and isinstance(repeated, str | list | tuple) else 0
        if size > LARGEST:
            raise TooMuch(f"it makes a text or number of more than {LARGEST:,} characters")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def templates_in_a_sandbox() -> Iterator[None]:
    """While it lasts, the harness's templates reach nothing but the document they are filled with, in bounded time. Raises
    UserError where one tries to do more."""
    import lm_eval.utils as harness

    plain = harness.env
    harness.env = _Sandbox(loader=plain.loader, undefined=plain.undefined,
                           keep_trailing_newline=plain.keep_trailing_newline)
    harness.env.filters.update(plain.filters)
    try:
        yield
    except SecurityError as error:
        raise UserError(f"--tasks: a template reaches for Python ({error}); {ELSEWHERE}") from None
    except (TemplateError, OverflowError, MemoryError) as error:
        raise UserError(f"--tasks: a template of the task is wrong ({error or type(error).__name__}); mend it") from None
    finally:
        harness.env = plain
