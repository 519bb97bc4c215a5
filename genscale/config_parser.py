"""From YAML and the command line to a typed `Config`, by jsonargparse: one definition makes the YAML, the flags and `--help`.

The `model` and `data` sections depend on `model.family`, so a parser is built for the family that the command line or the
file names. Mistakes come out as one line (`UserError`), with the nearest key where a key is unknown.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    get_loader,
    set_dumper,
    set_loader,
    set_parsing_settings,
)

from genscale.config import (
    Config,
    OptimizerSettings,
    ParallelSettings,
    RunSettings,
    ScheduleSettings,
    TrackingSettings,
    TrainSettings,
)
from genscale.errors import UserError, nearest

set_parsing_settings(docstring_parse_attribute_docstrings=True)

COMMON_SECTIONS = {"run": RunSettings, "train": TrainSettings, "optimizer": OptimizerSettings, "schedule": ScheduleSettings,
                   "parallel": ParallelSettings, "tracking": TrackingSettings}
Families = Mapping[str, Any]

# A setting may have a name that Python keeps for itself (`model.from`). Its field then ends in an underscore (`from_`), which
# is put in where the user's words are read and taken out of all that the user reads.
_FIELD = re.compile(r"(?<![\w.])((?:--)?\w+\.)(" + "|".join(keyword.kwlist) + r")_(?!\w)")


def as_field(key: str) -> str:
    """`from` as `from_`; other names as they are."""
    return f"{key}_" if keyword.iskeyword(key) else key


def as_key(field: str) -> str:
    """`from_` as `from`; other names as they are."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def _renamed(content: Any, rename: Callable[[str], str]) -> Any:
    """The same sections with other keys for their settings; what lies deeper (the columns of filters) is the user's own."""
    if not isinstance(content, dict):
        return content
    return {section: {rename(key) if isinstance(key, str) else key: value for key, value in settings.items()}
            if isinstance(settings, dict) else settings for section, settings in content.items()}


set_loader("run", lambda text: _renamed(get_loader("yaml")(text), as_field), (yaml.YAMLError,))
set_dumper("run", lambda content: yaml.safe_dump(_renamed(content, as_key), sort_keys=False, allow_unicode=True))


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

    def parse_args(self, args: Sequence[str], **options: Any) -> Any:
        flags = [argument.partition("=") for argument in args]
        renamed = [f"--{'.'.join(map(as_field, flag[2:].split('.')))}" if flag.startswith("--") else flag
                   for flag, _, _ in flags]
        return super().parse_args([flag + equals + value for flag, (_, equals, value) in zip(renamed, flags, strict=True)],
                                  **options)

    def format_help(self) -> str:
        return re.sub(r"(?<= [A-Z])([A-Z]+)_(?!\w)", r"\1", _FIELD.sub(r"\1\2", super().format_help()))


def config_parser(families: Families, family: str, prog: str = "genscale train", description: str = "") -> RunParser:
    """The parser of one family: --config FILE, --print_config and a flag for every setting of every section."""
    parser = RunParser(prog, description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of a run; flags after it override it.")
    chosen = families[family]
    sections = {"run": COMMON_SECTIONS["run"], "model": chosen.model_settings, "data": chosen.data_settings,
                "objective": chosen.objective_settings,
                **{name: section for name, section in COMMON_SECTIONS.items() if name != "run"}}
    for name, section in sections.items():
        if dataclasses.fields(section):
            parser.add_class_arguments(section, name)
    return parser


def parse_config(families: Families, arguments: Sequence[str], prog: str = "genscale train", description: str = "") -> Config:
    """The config that the arguments mean. Raises UserError with one line for the user."""
    family = _family(families, arguments)
    parser = config_parser(families, family, prog, description)
    known = parser.keys()
    for file in _config_files(arguments):
        _check_keys(_read_yaml(file), known, where=f" in {file}")
    _check_flags(arguments, known)
    built = parser.instantiate(parse(parser, arguments))
    # A family without settings of its objective has no such section.
    config = Config(**{name: getattr(built, name, None) for name in Config.__dataclass_fields__})
    for name in ("model", "data", *(["objective"] if config.objective else []), *COMMON_SECTIONS):
        _check_values(getattr(config, name), f"{name}.")
    return config


def load_config(families: Families, file: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder's config.yaml."""
    return parse_config(families, ["--config", str(file), *overrides], prog="genscale")


def parse_settings(settings: type, arguments: Sequence[str], prog: str, description: str) -> Any:
    """An instance of one settings dataclass from its flags (for verbs that are not about a run's config). Raises UserError."""
    parser = RunParser(prog, description)
    parser.add_class_arguments(settings)
    arguments = [re.sub("(?<!^)(?<!^-)-", "_", flag) + equals + value if flag.startswith("--") else word
                 for word, (flag, equals, value) in ((word, word.partition("=")) for word in arguments)]
    switches = {f"--{name}" for name, kind in get_type_hints(settings).items() if kind is bool}
    following = [*arguments[1:], "--"]
    arguments = [f"{word}=true" if word in switches and after.startswith("--") else word
                 for word, after in zip(arguments, following, strict=False)]
    _check_flags(arguments, parser.keys())
    return settings(**vars(parser.instantiate(parse(parser, arguments))))


def split_flags(arguments: Sequence[str], belongs: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The flags whose name (without dashes) `belongs`, with their values, and the other words."""
    own, rest = [], []
    chosen = rest
    for word in arguments:
        if word.startswith("--"):
            chosen = own if belongs(word[2:].partition("=")[0]) else rest
        chosen.append(word)
    return own, rest


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """The namespace of the arguments; a mistake in them is one line (UserError)."""
    try:
        return parser.parse_args(list(arguments))
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_line(str(error))) from None


def take_number(arguments: Sequence[str], flag: str, least: int) -> tuple[int | None, list[str]]:
    """Split `flag N` (or `flag=N`) from the settings. Raises UserError."""
    values, rest = _take(arguments, flag)
    for value in values:
        if not value.isdigit() or int(value) < least:
            raise UserError(f"{flag}: must be a whole number of at least {least}, not '{value}'")
    return int(values[-1]) if values else None, rest


def take_text(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Split `flag VALUE` (or `flag=VALUE`) from the settings. Raises UserError."""
    values, rest = _take(arguments, flag)
    if any(not value or value.startswith("--") for value in values):
        raise UserError(f"{flag}: needs a value, as in `{flag} VALUE`")
    return values[-1] if values else None, rest


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


def _config_files(arguments: Sequence[str]) -> list[str]:
    files = []
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            files.append(arguments[position + 1])
        elif argument.startswith("--config="):
            files.append(argument.split("=", 1)[1])
    return files


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise UserError(f"--config: cannot read '{file}' ({error.strerror}){_nearest_file(file)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: '{file}' is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config: '{file}' must hold sections like 'train:' and 'model:', not a {type(content).__name__}")
    return content


def _nearest_file(file: str) -> str:
    folder = Path(file).parent
    return nearest(Path(file).name, (p.name for p in folder.iterdir() if p.is_file())) if folder.is_dir() else ""


def _family(families: Families, arguments: Sequence[str]) -> str:
    family = next(iter(families))
    for file in _config_files(arguments):
        model = _read_yaml(file).get("model")
        if isinstance(model, dict):
            family = model.get("family", family)
    for position, argument in enumerate(arguments):
        if argument == "--model.family" and position + 1 < len(arguments):
            family = arguments[position + 1]
        elif argument.startswith("--model.family="):
            family = argument.split("=", 1)[1]
    if not isinstance(family, str) or family not in families:
        raise UserError(f"model.family: '{family}' is not one of {', '.join(families)}{nearest(str(family), families)}")
    return family


def _check_keys(content: dict[str, Any], known: set[str], where: str, prefix: str = "") -> None:
    for key, value in content.items():
        path = f"{prefix}{key}"
        is_section = any(other.startswith(f"{path}.") for other in known)
        if is_section and isinstance(value, dict):
            _check_keys(value, known, where, f"{path}.")
        elif is_section:
            raise UserError(f"{path}: must be a section of settings{where}, not {value!r}")
        elif path not in known:
            raise UserError(f"{path}: unknown key{where}{_nearest_key(path, known)}")


def _check_values(section: Any, prefix: str) -> None:
    """What jsonargparse lets through: nothing where there must be something, and numbers that are none."""
    kinds = get_type_hints(type(section))
    for name in (field.name for field in dataclasses.fields(section)):
        value, kind = getattr(section, name), kinds[name]
        if value is None and type(None) not in get_args(kind):
            wanted = TYPE_WORDS.get(getattr(kind, "__name__", ""), "set")
            raise UserError(f"{prefix}{as_key(name)}: must be {wanted}, not None; leave the key out for its default")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{prefix}{as_key(name)}: must be a finite number, not {value}")


def _check_flags(arguments: Sequence[str], known: set[str]) -> None:
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag != "--" and flag[2:].removesuffix("+") not in known | {"help", "print_config"}:
            raise UserError(f"{flag}: unknown setting{_nearest_key(flag[2:], known)}")


def _nearest_key(path: str, known: set[str]) -> str:
    """The closest full key; a bare or misplaced name (`steps`) finds the section that has it (`train.steps`), and a section
    is compared with sections."""
    sections = {key.split(".")[0] for key in known if "." in key}
    leaves = sorted(known - sections)
    same_leaf = [key for key in leaves if key.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    if same_leaf:
        return f" (did you mean '{sorted(same_leaf)[0]}'?)"
    return (nearest(path, sections) if "." not in path else "") or nearest(path, leaves)


TYPE_WORDS = {
    "PositiveInt": "a whole number of at least 1", "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0", "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1", "OpenUnitInterval": "a number between 0 and 1",
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list like [0.9, 0.95]",
}


def _one_line(message: str) -> str:
    """jsonargparse's message in one line of plain words: the key, what it must be, what it was."""
    text = _FIELD.sub(r"\1\2", " ".join(message.split()))
    text = re.sub(r'^(?:Parser key|argument) "?(?:--)?([\w.]+)"?:', r"\1:", text)
    if match := re.match(r"^([\w.]+): Not of type (\w+): (.*)$", text):
        key, kind, why = match.groups()
        value = why.split(" does not conform")[0].rsplit(": ", 1)[-1]
        return f"{key}: must be {TYPE_WORDS.get(kind, kind)}, not {value}"
    if match := re.match(r"^([\w.]+): Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)$", text):
        key, choices, value = match.groups()
        allowed = [choice.strip(" '\"") for choice in choices.split(",")]
        return f"{key}: must be one of {', '.join(allowed)}, not {value}{nearest(value, allowed)}"
    if match := re.match(r"^([\w.]+): Does not validate .* Subtypes: \[(.*?), <class 'NoneType'>\] .*Given value: (.*)$", text):
        key, kind, value = match.groups()
        words = re.findall(r"(\w+)'", kind)
        wanted = f"one of {', '.join(words)}" if "Literal" in kind else TYPE_WORDS.get(words[-1] if words else kind, kind)
        return f"{key}: must be {wanted}, or null, not {value}"
    if match := re.match(r"^([\w.]+): Expected a <class '(\w+)'>\. Got value: (.*)$", text):
        key, kind, value = match.groups()
        return f"{key}: must be {TYPE_WORDS.get(kind, kind)}, not {value}"
    if match := re.match(r"^([\w.]+): Does not validate .* Subtypes: \[list\[str\].*Given value: (.*)$", text):
        return f"{match.group(1)}: must be text or a list of texts, not {match.group(2)}"
    return text[:600]
