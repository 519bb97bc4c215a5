"""What a user has got wrong in a config, in one line (`UserError`): the key, what it must be, what it was, the nearest key."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from genscale.errors import UserError, as_utf8, is_utf8, nearest, shortened
from genscale.masking import has_mask, has_password
from genscale.settings.keys import as_key, in_users_words
from genscale.settings.numbers import WHOLE_NUMBERS

TYPE_WORDS = {
    "PositiveInt": "a whole number of at least 1", "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0", "NonNegativeFloat": "a number of at least 0",
    "ClosedUnitInterval": "a number from 0 to 1", "OpenUnitInterval": "a number between 0 and 1",
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list like [0.9, 0.95]",
    "list": "a list like [a, b]", "list[str]": "a list of texts like ['0', '1'] (numbers in quotes)",
    "tuple[float, float]": "two numbers like [0, 255]", "dict": "a mapping like {a: 1.0, b: 2.0}",
    "dict[str, typing.Any]": "a mapping like {a: 1, b: text}",
}


NO_SETTINGS = {"config", "help", "print_config"}
"""What the command line has besides settings."""
WHOLE = {"hooks", "data.options", "data.filters", "optimizer.lr_of"}
"""Settings that are mappings with keys of the user's own."""


MOST = {"model.layers": 2000, "model.heads": 2**20, "model.kv_heads": 2**20, "model.head_width": 2**20,
        "model.mlp_width": 2**24, "model.positions": 2**30, "model.vocab_size": 2**30, "model.width": 2**17,
        "model.discriminator_width": 2**17, "model.hidden_width": 2**20, "model.latent": 2**24, "model.latents": 2**24,
        "model.multipliers": 2**10, "model.attention": 2**20, "model.hidden_layers": 1000, "model.blocks": 1000,
        "model.classes": 2**24, "data.size": 2**14, "data.pack": 2**16, "data.sequence_length": 2**30,
        "data.validation_points": 10**7, "data.workers": 512, "data.prefetch_steps": 10**6,
        "objective.importance_samples": 10**6, "objective.discriminator_steps": 10**4,
        "train.global_batch_size": 2**31, "train.micro_batch_size": 2**31}
"""Of what sizes something: more than anybody has use for, and little enough to be reckoned with before memory is asked for."""


def check_keys(content: dict[str, Any], known: set[str], where: str, prefix: str = "", given: set[str] | None = None) -> None:
    """Raises UserError for a key of a file that no setting has, or that it gives twice (in a section, and as `section.key`)."""
    given = set() if given is None else given
    for key, value in content.items():
        path = f"{prefix}{key}"
        is_section = _is_section(path, known)
        if path == "config":
            raise UserError(f"config: {value!r}{where}: a config cannot take in another file; write its sections here, or give "
                            "both on the command line, as --config FILE --config OTHER")
        if is_section and isinstance(value, dict):
            check_keys(value, known, where, f"{path}.", given)
        elif is_section:
            raise UserError(f"{path}: must be a section of settings{where}, not {value!r}")
        elif path not in known - NO_SETTINGS:
            raise UserError(f"{path}: unknown key{where}{_nearest_key(path, known - NO_SETTINGS)}")
        elif path in given:
            raise UserError(f"{path}: given twice{where}; leave one out")
        elif "." in str(key) and str(key).split(".")[0] in content:  # which would take its place
            raise UserError(f"{path}: stands beside the section {path.split('.')[0]}{where}; move it in there")
        given.add(path)


def _is_section(path: str, known: set[str]) -> bool:
    return any(other.startswith(f"{path}.") for other in known)


def check_no_code(content: Any) -> None:
    """Raises UserError for what jsonargparse would take for a class and import, wherever any value may stand."""
    if isinstance(content, (dict, list)):
        if "class_path" in content and isinstance(content, dict):
            raise UserError(f"class_path: {content['class_path']!r}: a config cannot name code; leave it out")
        for value in content.values() if isinstance(content, dict) else content:
            check_no_code(value)


def check_values(section: Any, prefix: str, names: Iterable[str] | None = None) -> None:
    """What jsonargparse lets through: nothing where there must be something, and numbers that are none. Of the fields `names`
    (default: of all)."""
    kinds = get_type_hints(type(section))
    for name in [field.name for field in dataclasses.fields(section)] if names is None else names:
        value, kind = getattr(section, name), kinds[name]
        if value is None and type(None) not in get_args(kind):
            wanted = TYPE_WORDS.get(getattr(kind, "__name__", ""), "set")
            raise UserError(f"{prefix}{as_key(name)}: must be {wanted}, not None; leave the key out for its default")
        if refusal := empty(f"{prefix}{as_key(name)}", value):
            raise refusal
        most = MOST.get(f"{prefix}{name}", WHOLE_NUMBERS)
        for number in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{prefix}{as_key(name)}: must be a finite number, not {number}")
            if isinstance(number, int) and number > most:
                raise UserError(f"{prefix}{as_key(name)}: must be at most {most}, not {shortened(str(number))}")
        for address in _texts(value):
            if not address.isascii() and not is_utf8(address):
                raise UserError(f"{prefix}{as_key(name)}={as_utf8(address)}: is no UTF-8, as config.yaml and checkpoints must "
                                "be; rename it, or give a link to it (ln -s) with a name that is")
            if has_password(address):
                raise UserError(f"{prefix}{as_key(name)}={address}: an address must not hold a user's name or password, which "
                                f"would be written with it; put them into ~/.netrc (machine {urlsplit(address).hostname} login "
                                "USER password PASSWORD) and leave them out here")


def empty(key: str, value: Any) -> UserError | None:
    """The error for a text of nothing, alone or in a list: a path of nothing is the folder that the user happens to be in."""
    texts = value if isinstance(value, list) else [value]
    if not any(isinstance(text, str) and not text.strip() for text in texts):
        return None
    return UserError(f"{key}: {value!r} is empty (was the variable that it comes from not set?); give a value, or leave it out")


def check_not_masked(section: Any, prefix: str) -> None:
    """Raises UserError for a web address whose token was left out where the config was written, so that it leads nowhere."""
    for field in dataclasses.fields(section):
        for address in _texts(getattr(section, field.name)):
            if has_mask(address):
                key = f"{prefix}{as_key(field.name)}"
                raise UserError(f"{key}={address}: its token was left out when this was written; give the whole address with "
                                f"--{key}")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def check_flags(arguments: Sequence[str], known: set[str]) -> None:
    """Raises UserError for a flag that no setting has."""
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        name = flag[2:].removesuffix("+")
        if not flag.startswith("--") or flag == "--":
            continue
        if _is_section(name, known):  # which the parser would take from a file
            first = min(key for key in known if key.startswith(f"{name}."))
            raise UserError(f"{flag}: is a section; give its settings one by one, as in --{first} VALUE")
        for whole in WHOLE & known:
            if name.startswith(f"{whole}."):
                inner = "VALUE"
                for part in reversed(name.removeprefix(f"{whole}.").split(".")):
                    inner = f"{{{part}: {inner}}}"
                raise UserError(f"{flag}: --{whole} is given as a whole, as in --{whole} '{inner}'")
        if name not in known | NO_SETTINGS:
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


def one_line(message: str) -> str:
    """jsonargparse's message in one line of plain words: the key, what it must be, what it was."""
    text = in_users_words(" ".join(message.split()))
    text = re.sub(r'^(?:Parser key|argument) "?(?:--)?([\w.]+)"?:', r"\1:", text)
    if match := re.match(r"^([\w.]+): Not of type (\w+): (.*)$", text):
        key, kind, why = match.groups()
        value = re.split(r" does not conform| not an? (?:integer|number)$", why)[0].rsplit(": ", 1)[-1]
        if found := re.search(r"argument must be .*, not '(\w+)'$", why):
            value = {"NoneType": "null", "list": "a list", "dict": "a mapping"}.get(found[1], found[1])
        return f"{key}: must be {TYPE_WORDS.get(kind, kind)}, not {value}"
    if match := re.match(r"^([\w.]+): Expected a typing\.Literal\[(.*?)\]\. Got value: ?(.*)$", text):
        key, choices, value = match.groups()
        allowed = [choice.strip(" '\"") for choice in choices.split(",")]
        return f"{key}: must be one of {', '.join(allowed)}, not {value or repr(value)}{nearest(value, allowed)}"
    if match := re.match(r"^([\w.]+): Does not validate .* Subtypes: \[(.*?), <class 'NoneType'>\] .*Given value:(.*)$", text):
        key, kind, value = match[1], match[2], match[3].strip()
        words = re.findall(r"(\w+)'", kind)
        if words and words[0] in TYPE_WORDS and "Literal" in kind:
            wanted = f"{TYPE_WORDS[words[0]]}, {', '.join(words[1:])}"
        else:
            wanted = f"one of {', '.join(words)}" if "Literal" in kind else TYPE_WORDS.get(words[-1] if words else kind, kind)
        return f"{key}: must be {wanted}, or null, not {value or repr(value)}"
    if match := re.match(r"^([\w.]+): Expected a <class '(\w+)'>\. Got value: ?(.*)$", text):
        key, kind, value = match.groups()
        return f"{key}: must be {TYPE_WORDS.get(kind, kind)}, not {value or repr(value)}"
    if match := re.match(r"^([\w.]+): Expected a tuple with (\d+) elements\. Got value: (.*)$", text):
        key, count, value = match.groups()
        return f"{key}: must be a list of {count}, not {value}"
    if match := re.match(r"^([\w.]+): Does not validate .* Subtypes: \[list\[str\].*Given value: (.*)$", text):
        return f"{match.group(1)}: must be text or a list of texts, not {match.group(2)}"
    return text[:600]
