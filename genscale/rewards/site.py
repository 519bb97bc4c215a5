"""What the people who run a machine allow rewards to start, and to ask over the network: a config can only choose among that.

The file is the one that the variable GENSCALE_SITE names, else the user's own `~/.config/genscale/site.yaml`, else
`/etc/genscale/site.yaml`; never one that lies beside a config or in the current folder, which may be a stranger's. In it:

    rewards:
      programs:
        unit-tests: {command: [/opt/judges/unit-tests, --strict], seconds: 10, memory_mb: 512}
      addresses: [https://judge.example.org/v1/]
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from genscale.errors import UserError, nearest
from genscale.reading import Unreadable, read_yaml
from genscale.settings.parser import settings_of

VARIABLE = "GENSCALE_SITE"
OF_THE_MACHINE = Path("/etc/genscale/site.yaml")
KEYS = ("programs", "addresses")


@dataclass(frozen=True)
class Program:
    """A program that may judge."""

    command: list[str]
    """The program, by its absolute path, and its arguments; no shell reads them."""
    seconds: float = 30.0
    """For one answer; a program that takes longer is killed."""
    cpu_seconds: int = 3600
    """CPU time of one process, which is then started anew."""
    memory_mb: int = 1024
    """Memory that it may ask for."""
    environment: dict[str, str] = field(default_factory=dict)
    """All the variables that it has, besides PATH and LANG."""

    def __post_init__(self) -> None:
        if not self.command:
            raise UserError("command: names no program; give its absolute path and arguments, as [/opt/judges/unit-tests]")
        for name in ("seconds", "cpu_seconds", "memory_mb"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: must be above 0, not {getattr(self, name)}")
        path = Path(self.command[0])
        if not path.is_absolute():
            raise UserError(f"command: {self.command[0]!r} is no absolute path")
        _check_trusted(path, "command: ")
        if not os.access(path, os.X_OK):
            raise UserError(f"command: {path} cannot be executed (chmod +x {path})")


@dataclass(frozen=True)
class RewardSite:
    """What a site allows.

    Attributes:
        file: that says so; None where there is none.
        programs: settings of programs by name, not yet checked.
        addresses: beginnings of web addresses.
    """

    file: Path | None = None
    programs: Mapping[str, Any] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()

    def program(self, name: str) -> Program:
        """The program of a name. Raises UserError where the site names none, or one that is not fit."""
        if name not in self.programs:
            raise UserError(f"program: '{name}' is none that this site allows{self._those(self.programs)}"
                            f"{nearest(name, self.programs)}; who runs the machine names it under rewards.programs")
        return settings_of(Program, self.programs[name], f"program: {self.file}: rewards.programs.{name}")

    def check_address(self, url: str) -> SplitResult:
        """The parts of an address. Raises UserError where the site does not allow it."""
        parts = _split(url)
        if parts is None:
            raise UserError(f"url: {url!r:.200} is no plain address like https://judge.example.org/v1/score")
        if not any(_is_below(parts, _split(allowed)) for allowed in self.addresses):
            raise UserError(f"url: {url} is none that this site allows{self._those(self.addresses)}; who runs the machine "
                            "names it, or how it begins, under rewards.addresses")
        return parts

    def _those(self, allowed: Any) -> str:
        if self.file is None:
            return f" (there is no file of the site; see {VARIABLE})"
        return f" ({self.file} allows {', '.join(map(str, allowed)) or 'none'})"


def read_reward_site() -> RewardSite:
    """What is allowed here. Raises UserError: the file is not fit to be trusted, or is none."""
    named = os.environ.get(VARIABLE)
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "genscale" / "site.yaml"
    path = Path(named) if named else next((each for each in (own, OF_THE_MACHINE) if each.is_file()), None)
    if path is None:
        return RewardSite()
    _check_trusted(path, f"{VARIABLE}: " if named else "")
    try:
        content = read_yaml(path)
    except (OSError, Unreadable) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({why})") from None
    section = content.get("rewards") if isinstance(content, dict) else None
    if section is None:
        return RewardSite(path)
    for key in section if isinstance(section, dict) else ():
        if key not in KEYS:
            raise UserError(f"{path}: rewards.{key}: unknown key{nearest(str(key), KEYS)}")
    programs = section.get("programs") or {} if isinstance(section, dict) else None
    addresses = section.get("addresses") or [] if isinstance(section, dict) else None
    if not isinstance(programs, dict) or not isinstance(addresses, list):
        raise UserError(f"{path}: rewards: must hold `programs`, a mapping, and `addresses`, a list")
    if odd := [each for each in addresses if not isinstance(each, str) or _split(each) is None]:
        raise UserError(f"{path}: rewards.addresses: {odd[0]!r:.200} is no plain address like https://judge.example.org/v1/")
    return RewardSite(path, {str(name): value for name, value in programs.items()}, tuple(addresses))


def _check_trusted(path: Path, key: str) -> None:
    """Raises UserError where it is no plain file, or others may write it."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{key}{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{key}{path}: is no plain file")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH:
        raise UserError(f"{key}{path}: may be written by others than you and root, so that anybody could name programs in it; "
                        f"chmod o-w {path}, or make it yours")


def _split(url: str) -> SplitResult | None:
    """The parts of a plain address of the web: no user, no fragment, no way up."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    odd = not url.isascii() or not url.isprintable() or set(url) & set(" \\@#%") or ".." in parts.path
    return None if odd or parts.scheme not in ("http", "https") or not parts.hostname else parts


def _is_below(parts: SplitResult, allowed: SplitResult | None) -> bool:
    def place(each: SplitResult) -> tuple[str, str | None, int]:
        return each.scheme, each.hostname, each.port or (443 if each.scheme == "https" else 80)

    if allowed is None or place(parts) != place(allowed):
        return False
    beginning = allowed.path or "/"
    return (parts.path or "/") == beginning or (parts.path or "/").startswith(f"{beginning.rstrip('/')}/")
