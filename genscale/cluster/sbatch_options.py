"""Options of sbatch besides those that make a job one of ours: of the site, of `--sbatch`, and of flags by name."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from genscale.errors import UserError

OURS = {
    "nodes": "--nodes", "ntasks": "--tasks-per-node", "ntasks-per-node": "--tasks-per-node",
    "ntasks-per-gpu": "--tasks-per-node", "ntasks-per-core": "--tasks-per-node", "ntasks-per-socket": "--tasks-per-node",
    "cpus-per-task": "--cpus-per-process", "cpus-per-gpu": "--cpus-per-process", "gpus": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node", "gpus-per-socket": "--gpus-per-node", "gpus-per-task": "--gpus-per-task",
    "time": "--time", "array": "--array", "partition": "--partition", "account": "--account", "signal": "--signal and --lead",
    "requeue": "--max-requeues", "no-requeue": "--max-requeues", "test-only": "--dry-run", "job-name": "run.name",
    "output": "", "error": "", "open-mode": "", "export": "", "export-file": "", "chdir": "", "wait": "", "wrap": "",
    "parsable": "", "clusters": "", "help": "", "usage": "", "version": "",
}  # fmt: skip
"""Options that genscale sets itself, and the setting that says how; empty where the life of a job depends on them."""
NAMED = ("qos", "reservation", "constraint", "exclude", "nodelist", "mem", "mail_type", "mail_user", "comment", "begin",
         "dependency")
"""Those that `genscale slurm` has a flag for, which means the same."""


def merge(site: Iterable[str], typed: Iterable[str], named: Mapping[str, str | None]) -> list[str]:
    """The options as words for sbatch. What is typed comes before the site's, and a flag by name before both.

    Args:
        site: entries of `site.sbatch`, as `--qos=long` (or several options in one).
        typed: those of `--sbatch`.
        named: value by option, `{"qos": "long"}`; None for one without a value.

    Raises UserError for what is no option, or is one of OURS.
    """
    merged: list[tuple[str, str | None]] = []
    levels = (*([option for entry in entries for option in _options_of(entry, setting)]
                for setting, entries in (("site.sbatch", site), ("--sbatch", typed))), list(named.items()))
    for level in levels:
        names = {name for name, _ in level}
        merged = [option for option in merged if option[0] not in names] + level
    return [f"--{name}" if value is None else f"--{name}={value}" for name, value in merged]


def _options_of(entry: str, setting: str) -> list[tuple[str, str | None]]:
    try:
        words = shlex.split(entry)
    except ValueError as error:
        raise UserError(f"{setting}: '{entry}' has a quote that is not closed ({error})") from None
    if not words or not entry.isprintable() or not words[0].startswith("--"):
        raise UserError(f"{setting}: must be options of sbatch, as --qos=long, not '{entry}'")
    if "=" in words[0] and not any(word.startswith("--") for word in words[1:]) and len(words) > 1:
        words = [entry.strip()]  # one value with spaces
    options: list[tuple[str, str | None]] = []
    for word in words:
        name, equals, value = word[2:].partition("=")
        if word.startswith("--"):
            _check_is_not_ours(name, value, word, setting)
            options.append((name, value if equals else None))
        elif options[-1][1] is None:  # --qos long
            options[-1] = (options[-1][0], word)
        else:
            raise UserError(f"{setting}: '{word}' in '{entry}' belongs to no option; put quotes around a value with spaces")
    return options


def _check_is_not_ours(name: str, value: str, word: str, setting: str) -> None:
    ours = name if name in OURS else next((each for each in OURS if each.startswith(name)), None)  # sbatch takes --part for it
    if name == "gres" and any(part.partition(":")[0] == "gpu" for part in value.split(",")):
        raise UserError(f"{setting}: {word} would beat what genscale asks for; leave it out, and use --gres (in a site, gres: "
                        f"{value})")
    if ours is None:
        return
    instead = f"and use {OURS[ours]}" if OURS[ours] else "for the life of a job depends on how genscale sets it"
    raise UserError(f"{setting}: {word} would beat what genscale asks for; leave it out, {instead}")
