"""The run folder: its layout, the resolved config in it, and whether a run may go on from what is there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from genscale.checkpoint.checkpoints import Checkpoint, latest_valid, list_checkpoints
from genscale.checkpoint.provenance import check_sources
from genscale.checkpoint.writing import clear_leftovers
from genscale.data.lanes import Data
from genscale.data.locations import of_a_run_that_goes_on
from genscale.data.plans import only_moved, plan_differences
from genscale.errors import UserError
from genscale.families import family
from genscale.interop.starting import complete_from
from genscale.masking import masked, masked_throughout
from genscale.reading import dump_yaml, parse_yaml, read_yaml
from genscale.rewards.entries import KEY
from genscale.rewards.entries import moved as moved_judges
from genscale.settings.config import (
    MAY_CHANGE_AT_RESUME,
    MUST_NOT_CHANGE_AT_RESUME,
    Config,
    DataSettings,
    RunSettings,
    TrainSettings,
)
from genscale.settings.keys import as_key
from genscale.writing import make_folder, refuse_link, write_draft

PARTS = ("checkpoints", "samples", "plots", "logs")
OTHERS = ("wandb", "tensorboard", "profile")
"""Folders in it that are made when something is written there."""


def run_folder(settings: RunSettings) -> Path:
    """<run.dir>/<run.name>, which may be a link that the owner of run.dir has made. Raises UserError for a name that would
    leave run.dir, or that cannot be printed."""
    name = settings.name
    if not name or Path(name).name != name or name in (".", "..") or not name.isprintable():
        raise UserError(f"run.name: {name!r} must be a plain folder name (no '/', not '..'); the folder above it is run.dir")
    return Path(settings.dir).expanduser() / name


def places_of(config: Config) -> list[Path]:
    """Where a checkpoint may lie that the run goes on from."""
    return [*([] if config.run.resume in ("auto", "never") else [Path(config.run.resume)]), run_folder(config.run)]


def create_run_folder(folder: Path) -> None:
    """Make the folder and its parts, and prove that files can be written there. Raises UserError."""
    try:
        for part in PARTS:
            make_folder(folder / part, parents=True)
        for part in OTHERS:
            refuse_link(folder / part)
        write_draft(folder / "probe", b"0" * 4096).unlink()
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder} ({error.strerror}); set --run.dir to a folder you can "
                        f"write to") from None


def check_host_memory(parameters: int, averages: int = 0, share: float = 1.0, copies: float = 0.0, frozen: int = 0) -> None:
    """Refuse to start where no checkpoint could be written: each process copies its part to host memory first, 12 bytes a
    parameter as on the disk, and 4 for each that an average is kept of; and where the model does not fit that is trained there.

    Args:
        share: of all processes, that run on this machine.
        copies: of the weights and their gradients that are held in this machine's memory, 8 bytes a parameter.
        frozen: parameters that are held, 4 bytes each in every copy, and neither trained nor in checkpoints.
    """
    each = 12 * share + 8 * copies
    free, needed = psutil.virtual_memory().available, each * parameters + 4 * averages * share + 4 * frozen * copies
    if free < needed:
        beside = " beside the weights and their gradients" if copies else ""
        need = f"{needed / 2**30:,.0f} GiB of this machine's memory, of which {free / 2**30:,.0f} GiB are free"
        raise UserError(f"model: a checkpoint of {parameters:,} parameters is collected{beside} in {need}; at most "
                        f"{int(free / each):,} parameters fit")


def check_batch_memory(data: DataSettings, micro_batch_size: int, steps: int) -> None:
    """Refuse to start where the samples that a process holds at once, those loaded ahead among them, are more than this
    machine's memory. Raises UserError."""
    if hasattr(data, "sequence_length"):
        sample = 4 * (data.sequence_length + 1)
    else:
        sample = getattr(data, "channels", 1) * getattr(data, "size", 1) ** 2
    batches = 1 + min(data.prefetch_steps, steps)
    memory, needed = psutil.virtual_memory().total, sample * micro_batch_size * batches
    if memory < needed:
        raise UserError(f"train.micro_batch_size: {micro_batch_size} samples of {sample:,} bytes and data.prefetch_steps "
                        f"{data.prefetch_steps} more such batches are {needed / 2**30:,.0f} GiB, and this machine has "
                        f"{memory / 2**30:,.0f} GiB of memory; at most {memory // (sample * batches):,} samples fit")


def check_free_space(folder: Path, parameters: int, averages: int, train: TrainSettings, warn: Callable[[str], None],
                     frozen: int = 0) -> None:
    """Refuse to start where the checkpoints cannot fit: 12 bytes a parameter each (fp32 weights, two AdamW moments), and 4 for
    each that an average is kept of; and the one copy of the frozen parameters, 4 bytes each. Warn where those cannot that are
    kept for ever: they may be moved elsewhere meanwhile."""
    # Checkpoints that are there already are replaced one for one; one more is written before the oldest is deleted.
    keep, steps = train.checkpoint_keep, [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")]
    size, free = 12 * parameters + 4 * averages, shutil.disk_usage(folder).free
    wanted = size * max(1, keep + 1 - len(steps)) + 2**20 + (0 if steps else 4 * frozen)
    if free < wanted:
        fewer = f"lower train.checkpoint_keep ({keep}), " if keep > max(1, len(steps)) else ""
        raise UserError(f"run.dir: disk full: {folder} has {free / 2**20:,.0f} MiB free, checkpoints need "
                        f"{wanted / 2**20:,.0f} MiB; free some space, {fewer}or set --run.dir to another disk")
    if train.checkpoint_every and train.checkpoint_keep_every:
        every = math.lcm(train.checkpoint_every, train.checkpoint_keep_every)
        more = size * (train.steps // every - max(steps, default=0) // every)
        if free < wanted + more:
            least = train.steps // (int(free - wanted) // size + 1) + 1
            warn(f"train.checkpoint_keep_every: {train.checkpoint_keep_every} keeps {more // size:,} more checkpoints for ever "
                 f"({more / 2**20:,.0f} MiB), and {folder} has {free / 2**20:,.0f} MiB free; move some elsewhere in time, or "
                 f"set it to {least:,} or more")


def config_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts of plain values, keys as the user writes them; tokens in addresses are masked."""
    sections = {section: {as_key(key): _plain(value) for key, value in settings.items()}
                for section, settings in dataclasses.asdict(config).items() if settings}
    return parse_yaml(dump_yaml(sections))


def _plain(value: Any) -> Any:
    """Tuples and restricted number types as what YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return masked(value)
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def config_yaml(config: Config) -> str:
    return dump_yaml(config_dict(config))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} as {"train.steps": 5}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def check_may_continue(config: Config, checkpoint: Checkpoint, plan: dict[str, Any]) -> list[str]:
    """Compare the config and the data plan with the checkpoint's. Returns the keys that changed and may, as text.

    Raises UserError naming every key that differs and must not.
    """
    new = flatten(config_dict(config))
    # A setting that did not exist when the checkpoint was written had its default's effect.
    defaults = flatten(config_dict(Config(model=type(config.model)(), data=type(config.data)(),
                                          objective=type(config.objective)() if config.objective else None)))
    # An earlier version may have known fewer shapes of tokens.
    old = {**{key: defaults.get(key) for key in new}, **masked_throughout(flatten(checkpoint.config()))}
    changed = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}
    recorded = masked_throughout(checkpoint.state()["plan"])
    differing = plan_differences(recorded, plan)
    moved = {key: pair for key, pair in changed.items()
             if only_moved(key, *pair, plan) or _judged_elsewhere(key, *pair, checkpoint)}
    fatal = {key: pair for key, pair in changed.items() if key not in moved and (
             key in MUST_NOT_CHANGE_AT_RESUME or not key.startswith(MAY_CHANGE_AT_RESUME))}
    if fatal:
        what = ", ".join(f"{key} (was {was!r}, now {now!r})" for key, (was, now) in fatal.items())
        raise UserError(f"run.resume: the checkpoint {checkpoint.path} was made with another config: {what}; set them back, "
                        "or begin a new run with another --run.name (or --run.resume never)")
    if differing:
        pairs = {key: (recorded.get(key), plan.get(key)) for key in differing} | moved
        what = ", ".join(f"{key} (was {was!r}, now {now!r})" for key, (was, now) in pairs.items())
        raise UserError(f"run.resume: the data is not what the checkpoint {checkpoint.path} was trained on: {what}; "
                        "begin a new run with another --run.name (or --run.resume never)")
    return [f"{key}: {was!r} -> {now!r}" for key, (was, now) in changed.items()]


def _judged_elsewhere(key: str, was: Any, now: Any, checkpoint: Checkpoint) -> bool:
    """Whether the setting says no more than where the runs lie whose networks judge, which the checkpoint knows."""
    names = moved_judges(was, now) if key == KEY else set()
    return bool(names) and names <= (checkpoint.state().get("judges") or {}).keys()


def check_same_accumulation(train: TrainSettings, checkpoint: Checkpoint, accumulation: int, world_size: int) -> None:
    """For losses that depend on which samples share a micro-batch. Statistics span all processes, so the number of
    micro-batches in a step says which those are, for any number of processes.

    Raises:
        UserError: it is not the checkpoint's; names the micro-batch size that makes it so.
    """
    recorded = checkpoint.state().get("accumulation", accumulation)
    if recorded == accumulation:
        return
    share, rest = divmod(train.global_batch_size, world_size * recorded)
    instead = f"set train.micro_batch_size to {share}"
    if rest:
        instead = f"start a number of processes that divides {train.global_batch_size // recorded}"
    micro = train.global_batch_size // (world_size * accumulation)
    raise UserError(f"train.micro_batch_size: {micro} on {world_size} process{'es' if world_size > 1 else ''} makes "
                    f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} of a step, and the checkpoint "
                    f"{checkpoint.path} was trained with {recorded}: samples of a micro-batch are normalised or judged "
                    f"together, so this would be another run; {instead}")


def open_data(config: Config, folder: Path) -> tuple[Config, Data]:
    """The config, completed from the model that the run starts from, and the run's data. Raises UserError."""
    recorded = recorded_in(folder, config.run.resume)
    check_sources(config, [recorded] if recorded else [])
    config, settings = complete_from(config, recorded)
    with of_a_run_that_goes_on(recorded is not None or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0):
        return config, family(config.model.family).build_data(settings, config.run.seed)


def recorded_in(folder: Path, resume: str) -> Path | None:
    """The checkpoint whose config.yaml says what the run was so far, as `run.resume` has it; its bytes are not verified yet."""
    if resume == "never":
        return None
    paths = [checkpoint.path for checkpoint in list_checkpoints(folder / "checkpoints")] if resume == "auto" else [Path(resume)]
    for path in reversed(paths):
        try:
            if isinstance(read_yaml(path / "config.yaml"), dict):
                return path
        except (OSError, ValueError):
            continue
    return None


def find_resume_point(folder: Path, resume: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """What `run.resume` means here. `never` moves an earlier run aside, so that nothing is lost. Raises UserError."""
    clear_leftovers(folder / "checkpoints")
    if resume == "never":
        _move_earlier_run_aside(folder, warn)
        return None
    if resume == "auto":
        found = latest_valid(folder / "checkpoints", warn)
        if found is None and list_checkpoints(folder / "checkpoints"):
            raise UserError(f"run.resume: every checkpoint in {folder / 'checkpoints'} is damaged; begin anew with "
                            f"--run.resume never")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise UserError(f"run.resume: '{resume}' is not a checkpoint folder; use auto, never, or a path like "
                        f"{folder / 'checkpoints' / 'step-00000100'}")
    chosen = Checkpoint(path)
    problem = chosen.problem()
    if problem:
        raise UserError(f"run.resume: checkpoint {resume} is damaged ({problem}); use --run.resume auto for the "
                        f"latest valid one")
    return chosen


def _move_earlier_run_aside(folder: Path, warn: Callable[[str], None]) -> None:
    earlier = [path for path in folder.iterdir() if not path.name.startswith(("previous-", ".")) and path.name != "logs"]
    if not any((folder / "checkpoints").iterdir()) and not (folder / "metrics.jsonl").exists():
        return
    aside = _aside(folder)
    aside.mkdir()
    for path in earlier:
        path.rename(aside / path.name)
    create_run_folder(folder)
    warn(f"run.resume never: the earlier run was moved to {aside}")


def set_later_checkpoints_aside(folder: Path, step: int, warn: Callable[[str], None]) -> None:
    """A run that goes on from `step` must neither prune in favour of later checkpoints (damaged, or left behind by choice), nor
    continue from one of them after its next interruption."""
    later = [checkpoint.path for checkpoint in list_checkpoints(folder / "checkpoints") if checkpoint.step > step]
    if later:
        aside = _aside(folder) / "checkpoints"
        aside.mkdir(parents=True)
        for path in later:
            path.rename(aside / path.name)
        warn(f"run.resume: going on from step {step}; later checkpoints were moved to {aside}")


def _aside(folder: Path) -> Path:
    """A folder that is not there yet, named by the time in UTC: a run may go on in another time zone, twice in one second."""
    stem = folder / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}"
    names = itertools.chain([stem], (Path(f"{stem}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not path.exists())
