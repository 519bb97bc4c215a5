"""Writes the pages of the reference from the code: every setting, every verb and flag, the exit codes, the public names.

    python docs/reference/generate.py

A test compares the pages in the repository with what this writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import genscale
from genscale import errors, exit_codes, hook, rng
from genscale.cli import VERBS, main
from genscale.data import lanes, map_data, row_source, shard_data
from genscale.families import FAMILIES, entry, own
from genscale.inspection import check_family, family_report
from genscale.models import initial_draw, initial_weights, moving_state
from genscale.objectives import base, capabilities
from genscale.rewards import base as rewards_base
from genscale.rewards.registry import BUILT_IN, REWARDS
from genscale.testing import objectives, processes, runs, toy, training, workers
from genscale.verbs import checkpoint, data, rewards, slurm

FOLDER = Path(__file__).resolve().parent
CONTRACT: dict[ModuleType, tuple[str, ...]] = {
    base: (), entry: (), capabilities: (), own: ("SimpleObjective", "make_family"), lanes: (), map_data: ("MapData",),
    shard_data: ("ShardData",), row_source: ("RowSource",), hook: (), moving_state: (), initial_weights: ("InitialWeights",),
    initial_draw: (), rewards_base: ("Answer", "Reward", "TextReward", "ImageReward"), check_family: ("check_family",),
    family_report: ("FamilyReport", "Check"), processes: (), runs: (), training: (), workers: (), toy: (), objectives: (),
    errors: ("UserError",),
    rng: ("Draws", "numpy_generator", "torch_generator", "permutation"),
}  # fmt: skip
"""The modules that a family of one's own is written against, and the names meant for it where those are not all."""
ACTIONS = {"tokenizer": ["train"], "data": [*data.ACTIONS], "checkpoint": [*checkpoint.ACTIONS], "slurm": [*slurm.ACTIONS]}
NOTE = "<!-- Written by docs/reference/generate.py; change the code and run that. -->\n"
# Flags of argparse and jsonargparse that are no settings.
PLUMBING = re.compile(r"-h|--config|--print_config.*|--\w+|--.*\.help")


@dataclasses.dataclass(frozen=True)
class Flag:
    """A setting as `--help` shows it."""

    name: str
    meaning: str
    kind: str
    default: str


def pages() -> dict[str, str]:
    """The text of every page by file name."""
    return {"settings.md": settings_page(), "commands.md": commands_page(), "exit-codes.md": exit_codes_page(),
            "python.md": python_page(), "rewards.md": rewards_page()}


def help_of(*words: str) -> str:
    """What `genscale WORDS --help` prints, an entry a line."""
    before, out = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = "100000"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main([*words, "--help"])
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return out.getvalue()


def flags_in(text: str) -> list[Flag]:
    """The entries of a help text, without -h."""
    found = []
    for each in re.split(r"\n  (?=\S)", text)[1:]:
        words, _, meaning = " ".join(each.split("\n\n")[0].split("\n")).strip().partition("  ")
        if words.startswith("-h"):
            continue
        meaning = " ".join(meaning.split())
        # What jsonargparse adds stands last; before it the meaning may have a (default: ...) in words of its own.
        added = re.fullmatch(r"(.*)(?<!\w)\((required.*|type: .*|default: .*)\)", meaning)
        meaning, about = (added[1].rstrip(), added[2]) if added else (meaning, "")
        kind = re.search(r"type: (.*?)(?:, default: |$)", about)
        choices = re.search(r"[{\[].*[}\]]", words)
        default = re.search(r"default: (.*)$", about)
        found.append(Flag(words.split()[0].rstrip(","), meaning, kind[1] if kind else choices[0] if choices else "",
                          "required" if about.startswith("required") else default[1] if default else ""))
    return found


def table(flags: list[Flag], head: str) -> str:
    rows = [f"| {head} | meaning | type | default |", "|---|---|---|---|"]
    rows += [f"| {code(flag.name)} | {escaped(flag.meaning)} | {code(flag.kind)} | {code(flag.default)} |" for flag in flags]
    return "\n".join(rows) + "\n"


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def escaped(text: str) -> str:
    """A meaning as Markdown that shows it as it is written."""
    parts = text.replace("|", "\\|").split("`")  # every second one is code
    return "`".join(part if index % 2 else re.sub(r"([*\[\]])", r"\\\1", part).replace("<", "&lt;")
                    for index, part in enumerate(parts))


def settings_page() -> str:
    """Every section of a config; those that belong to a family once for each family that has them."""
    sections: dict[str, dict[str, list[str]]] = {}
    hooks = ""
    for name in FAMILIES:
        by_section: dict[str, list[Flag]] = {}
        for flag in flags_in(help_of("train", "--model.family", name)):
            if flag.name == "--hooks":
                hooks = f"## hooks\n\n{escaped(flag.meaning)} As a flag: `--hooks '{{patience: {{every: 50}}}}'`.\n"
            if not PLUMBING.fullmatch(flag.name):
                section, _, key = flag.name[2:].partition(".")
                by_section.setdefault(section, []).append(dataclasses.replace(flag, name=key))
        for section, flags in by_section.items():
            sections.setdefault(section, {}).setdefault(table(flags, "key"), []).append(name)
    parts = [f"# Every setting\n\n{NOTE}", "A key stands in the YAML under its section, and is a flag of `genscale train`: "
             "`lr` of section `optimizer` is `--optimizer.lr`. The sections `model`, `data` and `objective` belong to the "
             "family (`model.family`).\n"]
    for section, tables in sections.items():
        for text, names in tables.items():
            whose = "" if len(names) == len(FAMILIES) else f": {', '.join(names)}"
            parts.append(f"## {section}{whose}\n\n{text}")
    return "\n".join([*parts, hooks])


def commands_page() -> str:
    """Every verb with its actions and flags."""
    parts = [f"# Every command\n\n{NOTE}", "Settings of a run (flags with a dot, as `--data.source`) stand on the "
             "[page of the settings](settings.md).\n", "| verb | what it does |\n|---|---|",
             *(f"| `genscale {verb}` | {escaped(meaning)} |" for verb, meaning in VERBS.items()), ""]
    for verb in VERBS:
        for action in ACTIONS.get(verb, [""]):
            words = [verb, action] if action else [verb]
            parts.append(f"## genscale {' '.join(words)}\n")
            parts += list(_command(words))
    return "\n".join(parts)


def _command(words: list[str]) -> Iterator[str]:
    """The usages of one command: a verb for several families has one for each of their kinds."""
    for text in re.split(r"\n(?=usage: )", help_of(*words)):
        flags = flags_in(text)
        sections = {flag.name.partition(".")[0] for flag in flags if "." in flag.name}
        usage, _, rest = " ".join(text.removeprefix("usage: ").partition("\n\n")[0].split()), *text.partition("\n\n")[1:]
        places = [usage.find(f" [{name}{end}") for name in {flag.name for flag in flags} | sections for end in " ]."]
        if found := [place for place in places if place >= 0]:
            usage = usage[: min(found)] + " [flags]"
        description = "" if re.match(r"(options|positional arguments):", rest) else rest.partition("\n\n")[0].strip()
        if not description and len(words) == 2:
            description = {"checkpoint": checkpoint.ACTIONS, "slurm": slurm.ACTIONS}.get(words[0], {}).get(words[1], "")
        yield f"```text\n{usage}\n```\n"
        if description:
            yield sentence(escaped(" ".join(description.split()))) + "\n"
        if own := [flag for flag in flags if flag.name not in sections and "." not in flag.name and "--print" not in flag.name]:
            yield table(own, "flag or argument")
        if sections:
            names = ", ".join(f"`{name[2:]}`" for name in sorted(sections))
            yield f"And the [settings](settings.md) of {names}.\n"


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".")


def rewards_page() -> str:
    """Every built-in reward, and its settings."""
    parts = [NOTE, "# Every reward\n", "What the `rewards` of a config can name, and settings beside `name` and `weight`. "
             "[Rewards](../how-to/rewards.md) says how they are used, and how to bring your own.\n"]
    for name in BUILT_IN:
        kind = REWARDS[name]
        judged = "texts" if rewards.judges(kind) == "text" else "pictures"
        flags = [Flag(key, meaning, of, default.removeprefix("default "))
                 for key, of, default, meaning in rewards.rows_of(kind)]
        parts += [f"## {name}\n", f"Of {judged}. {escaped(rewards.sentence(kind))}\n", table(flags, "setting")]
    return "\n".join(parts)


def exit_codes_page() -> str:
    """The module's docstring, its list as a table."""
    first, listed, rest = re.fullmatch(r"(.*?)\n\n(    .*?)\n\n(?=\S)(.*)", inspect.getdoc(exit_codes), re.DOTALL).groups()
    rows = re.findall(r"^    (\S.*?)  +(.*(?:\n {5,}.*)*)", listed, re.MULTILINE)
    lines = [f"| `{number.strip()}` | {escaped(' '.join(meaning.split()))} |" for number, meaning in rows]
    return "\n".join([f"# Exit codes\n\n{NOTE}", first, "", "| code | meaning |", "|---|---|", *lines, "", rest, ""])


def python_page() -> str:
    """What `import genscale` offers, and the modules of the contract."""
    parts = [f"# Python names\n\n{NOTE}"]
    front = [(name, getattr(genscale, name)) for name in getattr(genscale, "__all__", ())]
    if front:
        parts += ["## genscale\n", *(_entry(name, value) for name, value in front)]
    for module, names in CONTRACT.items():
        parts += [f"## {module.__name__}\n", _prose(inspect.getdoc(module) or "") + "\n",
                  *(_entry(name, value) for name, value in _public(module) if not names or name in names)]
    return "\n".join(parts)


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


def _entry(name: str, value: Any) -> str:
    if isinstance(value, ModuleType) or not callable(value):
        return f"### {name}\n"
    lines = [f"### {name}\n", f"```python\n{_signature(name, value)}\n```\n", _prose(inspect.getdoc(value) or "") + "\n"]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            function = getattr(function, "__func__", function)
            if not method.startswith("_") and inspect.isfunction(function):
                prose = "\n".join(f"    {line}".rstrip() for line in _prose(inspect.getdoc(function) or "").split("\n"))
                lines.append(f"- `{_signature(method, function)}`\n\n{prose}\n")
    return "\n".join(lines)


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and not dataclasses.is_dataclass(value):
        bases = [each.__name__ for each in value.__bases__ if each is not object]
        return f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    try:
        signature = re.sub(r"<function [\w<>.]+ at \w+>", "...", str(inspect.signature(value)))
        return name + re.sub(r"<class [\w.]*?(\w+)>", r"\1", signature.replace("'", ""))
    except (ValueError, TypeError):
        return name


def _prose(text: str) -> str:
    """A docstring in Google's form as Markdown: lists for its sections, code for its examples."""
    lines, listing, example = [], False, False
    for line in text.splitlines():
        example = line.startswith(">>>") or (example and bool(line.strip()))
        if example:
            lines.append(f"    {line}")
        elif re.fullmatch(r"(Attributes|Args|Raises|Returns|Yields|Example|Examples):", line):
            lines += ["", f"**{line[:-1]}**", ""]
            listing = line[:-1] in ("Attributes", "Args", "Raises")
        elif listing and re.match(r"    \S", line):
            names, colon, meaning = line.strip().partition(": ")
            lines.append(f"- `{names}`: {meaning}" if colon else f"- {line.strip()}")
        else:
            listing = listing and (not line or line.startswith(" "))
            lines.append(f"  {line.strip()}" if listing else line if line.startswith("    ") else line.strip())
    return "\n".join(lines)


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
