"""From YAML and the command line to a typed `Config`, by jsonargparse: one definition makes the YAML, the flags and `--help`.

The `model` and `data` sections depend on `model.family`, so a parser is built for the family that the command line or the
file names. Mistakes come out as one line (`UserError`), with the nearest key where a key is unknown.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_dumper,
    set_loader,
    set_parsing_settings,
)

from genscale.errors import UserError, nearest
from genscale.reading import Unreadable, dump_yaml, parse_yaml, read_yaml
from genscale.settings.config import (
    Config,
    GuardSettings,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    ScheduleSettings,
    TrackingSettings,
    TrainSettings,
)
from genscale.settings.keys import as_field, as_key, in_users_words, renamed
from genscale.settings.mistakes import check_flags, check_keys, check_no_code, check_values, empty, one_line
from genscale.settings.numbers import check_numbers, number_keys, numbers_of, with_plain_numbers
from genscale.settings.paths import paths_beside
from genscale.settings.shipped import find_config, shipped_names

# Else a config that writes {class_path: ..., init_args: ...} where any value may stand would call what it names.
set_parsing_settings(docstring_parse_attribute_docstrings=True, instantiate_subclass_spec_in_any=False)

COMMON_SECTIONS = {"run": RunSettings, "train": TrainSettings, "guards": GuardSettings, "optimizer": OptimizerSettings,
                   "schedule": ScheduleSettings, "parallel": ParallelSettings, "tracking": TrackingSettings}
HOOKS = ("Hooks of installed packages to run besides, by name, each with its settings: {patience: {every: 50, looks: 5}}; "
         "every hook knows `every`. `genscale families` lists what is installed.")
Families = Mapping[str, Any]
T = TypeVar("T")


def _load(text: str) -> Any:
    """A file, or the value of a flag."""
    content = parse_yaml(text)
    if isinstance(content, dict) and content and all(value is None for value in content.values()) and "\n" not in text:
        return text  # of a flag: `word:`, or `{word}`
    check_no_code(content)
    return renamed(content, as_field)


set_loader("run", _load, (Unreadable,))
set_dumper("run", lambda content: dump_yaml(renamed(content, as_key), allow_unicode=True))


class RunParser(ArgumentParser):
    """jsonargparse with settings called as the user knows them."""

    def __init__(self, prog: str | None = None, description: str = "", **options: Any) -> None:
        # jsonargparse makes parsers of the same class, with options of its own, for the entries of a list of settings.
        options = {"exit_on_error": False, "default_env": False, "parser_mode": "run", **options}
        super().__init__(prog=prog, description=description, **options)

    def keys(self) -> set[str]:
        """Every key and section that a file or a flag may name."""
        # For a list of settings jsonargparse adds a `--<key>.help`; it is no part of a section.
        fields = [action.dest for action in self._actions if action.dest and not action.dest.endswith(".help")]
        return {".".join(map(as_key, field.split("."))) for field in fields}

    def parse_args(self, args: Sequence[str], **options: Any) -> Any:  # type: ignore[override]  # as jsonargparse's own
        flags = [argument.partition("=") for argument in args]
        renamed = [f"--{'.'.join(map(as_field, flag[2:].split('.')))}" if flag.startswith("--") else flag
                   for flag, _, _ in flags]
        return super().parse_args([flag + equals + value for flag, (_, equals, value) in zip(renamed, flags, strict=True)],
                                  **options)

    def format_help(self, *formatter: Any) -> str:
        return re.sub(r"(?<= [A-Z])([A-Z]+)_(?!\w)", r"\1", in_users_words(super().format_help(*formatter)))


def config_parser(families: Families, family: str, prog: str = "genscale train", description: str = "") -> RunParser:
    """The parser of one family: --config FILE, --print_config and a flag for every setting of every section."""
    return _parser_of(tuple(_sections(families[family]).items()), prog, description)


@functools.cache  # to read the source of the sections for their help takes longer than to parse a file
def _parser_of(sections: tuple[tuple[str, type], ...], prog: str, description: str) -> RunParser:
    parser = RunParser(prog, description)
    parser.add_argument("--config", action=ActionConfigFile,
                        help="YAML file of a run, or the name of one that `genscale configs` lists, as gpt/demo. A "
                             "flag wins over it wherever it stands, and of several files the later one.")
    for name, section in sections:
        if dataclasses.fields(section):
            parser.add_class_arguments(section, name)
    parser.add_argument("--hooks", type=dict[str, Any], default={}, help=HOOKS)
    return parser


def _sections(family: Any) -> dict[str, type]:
    return {"run": COMMON_SECTIONS["run"], "model": family.model_settings, "data": family.data_settings,
            "objective": family.objective_settings,
            **{name: section for name, section in COMMON_SECTIONS.items() if name != "run"}}


def parse_config(families: Families, arguments: Sequence[str], prog: str = "genscale train", description: str = "") -> Config:
    """The config that the arguments mean: a flag wins over every file, wherever it stands. Raises UserError with one line for
    the user."""
    words, flags = take_texts(arguments, "--config")
    files = [find_config(word) for word in words]
    contents = {file: _read_yaml(file) for file in files}
    family = _family(families, contents, flags)
    parser = config_parser(families, family, prog, description)
    known, numbers = parser.keys(), number_keys(_sections(families[family]))
    for file, content in contents.items():
        check_keys(content, known, where=f" in {file}")
        check_numbers(content, numbers)
    check_flags(flags, known)
    files_first = [f"--config={file}" for file in files] + with_plain_numbers(flags, numbers)  # taken as they come
    built = parser.instantiate(parse(parser, files_first))
    # A family without settings of its objective has no such section.
    sections: dict[str, Any] = {name: getattr(built, name, None) for name in Config.__dataclass_fields__}
    config: Config = Config(**sections)
    for key, path in paths_beside(contents, flags).items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{as_field(name): path})
        config = dataclasses.replace(config, **{section: changed})
    for name in ("model", "data", *(["objective"] if config.objective else []), *COMMON_SECTIONS):
        check_values(getattr(config, name), f"{name}.")
    return config


def load_config(families: Families, file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder's config.yaml."""
    return parse_config(families, ["--config", str(file), *overrides], prog="genscale")


@functools.cache
def _parser_of_flags(settings: type, prog: str, description: str) -> RunParser:
    parser = RunParser(prog, description)
    parser.add_class_arguments(settings)
    return parser


def parse_settings(settings: type, arguments: Sequence[str], prog: str, description: str) -> Any:
    """An instance of one settings dataclass from its flags (for verbs that are not about a run's config). Raises UserError."""
    parser = _parser_of_flags(settings, prog, description)
    arguments = [re.sub("(?<!^)(?<!^-)-", "_", flag) + equals + value if flag.startswith("--") else word
                 for word, (flag, equals, value) in ((word, word.partition("=")) for word in arguments)]
    switches = {f"--{name}" for name, kind in get_type_hints(settings).items() if kind is bool}
    following = [*arguments[1:], "--"]
    arguments = [f"{word}=true" if word in switches and after.startswith("--") else word
                 for word, after in zip(arguments, following, strict=False)]
    check_flags(arguments, parser.keys())
    arguments = with_plain_numbers(arguments, numbers_of(settings))
    parsed = settings(**vars(parser.instantiate(parse(parser, arguments))))
    for field in dataclasses.fields(settings):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{field.name}.")
        elif value != field.default and (refusal := empty(f"--{field.name}", value)):  # an empty prompt is one
            raise refusal
    return parsed


def settings_of(kind: type[T], given: Any, key: str) -> T:
    """An instance of a dataclass of typed settings, as a plug-in brings one, from what a config has under `key`; a class that
    is no dataclass has none.

    Raises:
        UserError: an unknown setting, one of another type, or one that is missing; in one line that begins with `key`.
    """
    if not isinstance(given or {}, Mapping):
        raise UserError(f"{key}: must be a mapping of settings like {{a: 1, b: 2}}, not {given!r}")
    values = dict(given or {})
    own = [field for field in dataclasses.fields(kind) if field.init] if dataclasses.is_dataclass(kind) else []
    fields = {as_key(field.name): field for field in own}
    for name in values:
        if name not in fields:
            there = f"the settings are {', '.join(fields)}" if fields else "it has no settings"
            raise UserError(f"{key}.{name}: unknown key{nearest(str(name), fields)}; {there}")
    for name, field in fields.items():
        if values.get(name) is None and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{key}.{name}: must be set; it has no default")
    if not fields:
        return kind()
    parser = RunParser()
    parser.add_class_arguments(kind)
    try:
        check_numbers(values, numbers_of(kind))
        by_field = {as_field(name): value for name, value in values.items()}
        made = kind(**vars(parser.instantiate(parser.parse_object(by_field))))
        check_values(made, "", by_field)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{key}.{one_line(str(error))}") from None
    return made


def split_flags(arguments: Sequence[str], belongs: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The flags whose name (without dashes) `belongs`, with their values, and the other words."""
    own: list[str] = []
    rest: list[str] = []
    chosen = rest
    for word in arguments:
        if word.startswith("--"):
            chosen = own if belongs(word[2:].partition("=")[0]) else rest
        chosen.append(word)
    return own, rest


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The namespace of the arguments; a mistake in them is one line (UserError)."""
    try:
        parsed = parser.parse_args(list(arguments), env=False)  # whatever JSONARGPARSE_DEFAULT_ENV says
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(one_line(str(error))) from None
    for action in parser._actions:
        if not action.option_strings and (refusal := empty(action.dest, getattr(parsed, action.dest, None))):
            raise refusal
    return parsed


def take_number(arguments: Sequence[str], flag: str, least: int) -> tuple[int | None, list[str]]:
    """Split `flag N` (or `flag=N`) from the settings. Raises UserError."""
    values, rest = _take(arguments, flag)
    for value in values:
        if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least:
            raise UserError(f"{flag}: must be a whole number of at least {least}, not '{value}'")
    return int(values[-1]) if values else None, rest


def take_text(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Split `flag VALUE` (or `flag=VALUE`) from the settings; of several the last. Raises UserError."""
    values, rest = take_texts(arguments, flag)
    return values[-1] if values else None, rest


def take_texts(arguments: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Split every `flag VALUE` (or `flag=VALUE`) from the settings. Raises UserError."""
    values, rest = _take(arguments, flag)
    if any(not value or value.startswith("--") for value in values):
        raise UserError(f"{flag}: needs a value, as in `{flag} VALUE`")
    return values, rest


def _take(arguments: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """The values of a flag (an empty one where it stands last without any), and the other words."""
    values, rest, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == flag:
            values.append(value if equals else next(words, ""))
        else:
            rest.append(word)
    return values, rest


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = read_yaml(file)
    except OSError as error:
        raise UserError(f"--config: cannot read '{file}' ({error.strerror}){_nearest_file(file)}") from None
    except Unreadable as error:
        raise UserError(f"--config: '{file}' {error}") from None
    if content is None:
        raise UserError(f"--config: '{file}' is empty; it must hold sections like 'train:' and 'model:'")
    if not isinstance(content, dict):
        raise UserError(f"--config: '{file}' must hold sections like 'train:' and 'model:', not a {type(content).__name__}")
    return content


def _nearest_file(file: str) -> str:
    folder = Path(file).parent
    there = nearest(Path(file).name, (p.name for p in folder.iterdir() if p.is_file())) if folder.is_dir() else ""
    return there or nearest(file, shipped_names())


def _family(families: Families, contents: Mapping[str, Mapping[str, Any]], flags: Sequence[str]) -> str:
    family = next(iter(families))
    for content in contents.values():
        model = content.get("model")
        if isinstance(model, dict):
            family = model.get("family", family)
    asked, _ = _take(flags, "--model.family")
    family = asked[-1] if asked else family
    if not isinstance(family, str) or family not in families:
        advice = families.advice(str(family), _run_folders(contents, flags)) if hasattr(families, "advice") else ""
        raise UserError(f"model.family: '{family}' is not one of {', '.join(families)}{nearest(str(family), families)}{advice}")
    return family


def _run_folders(contents: Mapping[str, Mapping[str, Any]], flags: Sequence[str]) -> list[Path]:
    """Where the run's checkpoints may lie, of settings that cannot be parsed without their family."""
    run = {"dir": RunSettings().dir, "name": RunSettings().name}
    for content in contents.values():
        run |= content["run"] if isinstance(content.get("run"), dict) else {}
    for key in run:
        run[key] = next(reversed(_take(flags, f"--run.{key}")[0]), run[key])
    return [*(Path(file).parent for file in contents), Path(str(run["dir"])).expanduser() / str(run["name"])]
