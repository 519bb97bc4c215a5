"""A job and its runs, from flags and settings to all that its script is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genscale.cluster.before_submission import wait_for
from genscale.cluster.job import Job, JobSettings, is_unlimited, no_time_limit, settle
from genscale.cluster.partition import find_partition
from genscale.cluster.script import Training
from genscale.cluster.site import Site, read_site
from genscale.errors import UserError
from genscale.families import FAMILIES
from genscale.masking import has_mask
from genscale.settings.config import Config, RunSettings
from genscale.settings.parser import parse_config


@dataclass(frozen=True)
class Prepared:
    """A job with all that its script is made of.

    Attributes:
        folder: that of the run; of an array, what the names of its runs begin with.
        configs: of every run, one for each value of an array.
    """

    job: Job
    site: Site
    training: Training
    folder: Path
    configs: list[Config]

    def runs(self) -> list[Path]:
        from genscale.supervise.run_folder import run_folder  # here and below: loads torch, which --help need not wait for

        return [run_folder(config.run) for config in self.configs]


def prepare_job(asked: JobSettings, settings: Sequence[str], submitted_with: str | None = None) -> Prepared:
    """Settle what is asked for with the site and the run.

    Args:
        settings: of the run, as they are typed.
        submitted_with: flags by which the job can be submitted again.

    Raises:
        UserError: what no cluster could run.
    """
    if not asked.config:
        raise UserError("--config: name the YAML file of the run, or one that `genscale configs` lists, as --config gpt/demo")
    from genscale.supervise.run_folder import run_folder
    from genscale.supervise.supervision import group_timeout_minutes

    site = read_site(asked.site)
    words = ["--config", asked.config, *settings]
    config = parse_config(FAMILIES, words)
    if FAMILIES.is_registered(config.model.family):
        raise UserError(f"model.family: '{config.model.family}' is known to {FAMILIES.script} alone, and a job runs genscale; "
                        "make it an installed package with an entry point genscale.families, or call `srun python "
                        f"{FAMILIES.script} train ...` in a script of your own")
    if (scratch := site.scratch_folder()) and config.run.dir == RunSettings().dir:
        config = replace(config, run=replace(config.run, dir=f"{scratch}/{config.run.dir}"))
    if is_unlimited(asked.time):
        partition = find_partition(asked.partition or site.partition) if shutil.which("sinfo") else None
        raise UserError(no_time_limit(asked.time, partition.time if partition else None))
    if asked.after:
        asked.dependency = ",".join(filter(None, (asked.dependency, wait_for(asked.after)))) or None
    job = settle(asked, site, config.run.name)
    folder = run_folder(config.run)
    if not str(folder).isprintable() or {"'", "\\"} & set(str(folder)):  # after a \ sbatch leaves %j as it is
        raise UserError(f"run.dir: {str(folder)!r} is not a path that a job's script can hold; choose another")
    configs = [config]
    if array := job.array:
        configs = []
        for element in array.elements():
            own = [f"--{key}={value}" for key, value in array.settings_of(element).items()]
            one = parse_config(FAMILIES, [*words, *own])
            run = replace(one.run, dir=config.run.dir, name=array.name_of(config.run.name, element))
            configs.append(replace(one, run=run))
        if len(names := {each.run.name for each in configs}) < len(configs):
            raise UserError(f"--array: its {len(configs)} runs would have {len(names)} names, for values look alike in the "
                            "name of a folder")
    training = Training(asked.config, str(folder), without(settings, ("--run.name", "--run.dir")),
                        int(60 * max(group_timeout_minutes(each.guards.hang_minutes) for each in configs)),
                        config.run.resume == "auto", max(each.data.workers for each in configs), submitted_with)
    prepared = Prepared(job, site, training, folder, configs)
    check_configs(prepared, _check_has_no_token)
    return prepared


def without(settings: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words without those flags and their values."""
    kept, words = [], iter(settings)
    for word in words:
        if word.partition("=")[0] not in flags:
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def check_configs(prepared: Prepared, check: Callable[[Config], None]) -> None:
    """Each run's; of runs that differ by their seed alone the first speaks for all, but for those that would go on."""
    array, seen = prepared.job.array, set()
    elements = array.elements() if array else [()]
    for config, run, element in zip(prepared.configs, prepared.runs(), elements, strict=True):
        others = tuple((key, value) for key, value in array.settings_of(element).items() if key != "run.seed") if array else ()
        if others in seen and not run.exists():
            continue
        seen.add(others)
        try:
            check(config)
        except UserError as error:
            if array is None:
                raise
            raise UserError(f"--array: {array.in_words(element)}: {error}") from None


def _check_has_no_token(config: Config) -> None:
    from genscale.supervise.run_folder import config_yaml

    if masked := next((line.strip() for line in config_yaml(config).splitlines() if has_mask(line)), None):
        raise UserError(f"{masked}: an address with a token cannot be kept with a job; put the token where the library "
                        "looks for it (HF_TOKEN, ~/.netrc), and leave it out here")
