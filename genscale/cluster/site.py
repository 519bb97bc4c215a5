"""What is particular to a cluster: partition, account, modules, container, folders. One YAML for all the runs on it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from genscale.cluster.gpus import read_gpus
from genscale.errors import UserError, nearest
from genscale.masking import SECRET_VARIABLES, has_mask, masked
from genscale.reading import Unreadable, read_yaml

CONTAINER_KINDS = ("apptainer", "pyxis")
OF_THE_REPOSITORY = Path("launch/site.yaml")
OF_REWARDS = "rewards"
"""A section that is no matter of jobs (`genscale.rewards.site`)."""
# TOKENIZERS_PARALLELISM is none, and HF_TOKEN_PATH says only where one is.
_SECRET_NAME = re.compile(rf"(?:{'|'.join(SECRET_VARIABLES)}|\w*(?:TOKEN(?!IZ)|SECRET|PASSW|API_?KEY)\w*)(?<!_PATH)(?<!_FILE)",
                          re.IGNORECASE)
# A value that the shell finds out ($(cat file), $NAME) is not in the line.
_SECRET_IN_LINE = re.compile(rf"\b(?P<name>{_SECRET_NAME.pattern})=(?!['\"]?[$`])['\"]?\w", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """The settings of `launch/site.yaml`."""

    partition: str | None = None
    """Partition of the jobs (default: the cluster's own)."""
    account: str | None = None
    """Account that pays for them (default: the user's own)."""
    gpus_per_node: int | str = 8
    """GPUs of a node, also with their kind as a100:4; 0 where jobs train on the CPU."""
    gres: str | None = None
    """The same for a Slurm that knows no --gpus-per-node, as gpu:h100:8; comes before gpus_per_node."""
    cpus_per_process: int = 8
    """CPU cores for each training process, its loader workers included."""
    sbatch: list[str] = field(default_factory=list)
    """Further lines for sbatch, as [--qos=long, --mem=0, --exclusive]."""
    modules: list[str] = field(default_factory=list)
    """Modules to load (`module load`), as [cuda/12.8]."""
    setup: list[str] | None = None
    """Lines of shell after that (default: `source .venv/bin/activate`; where there is no clone, the same of the virtual
    environment that genscale is installed in; or nothing with a container)."""
    node_setup: list[str] = field(default_factory=list)
    """Commands that each node runs before each life of a job, as [cp data.parquet /local]."""
    pre_commands: list[str] = field(default_factory=list)
    """Commands that the first node runs before each life, after that."""
    post_commands: list[str] = field(default_factory=list)
    """Commands that it runs after each life, however it ended; $code is 75 where the job is requeued."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all processes of a job, as {HF_HUB_OFFLINE: "1"}. No tokens: a job's script is kept in its run folder."""
    container: str | None = None
    """Image that Python runs in; it must have genscale installed."""
    container_kind: str = "apptainer"
    """apptainer, or what is called as it is; pyxis: srun's --container-image (enroot)."""
    container_command: str = "apptainer exec --nv --bind $PWD"
    """apptainer: what starts a program in the image, as far as the image's name."""
    container_mounts: list[str] = field(default_factory=list)
    """pyxis: folders that the image sees besides those of the job, its runs and scratch, as [/data, /local:/mnt]."""
    scratch: str | None = None
    """Folder on the disk that all nodes share: runs go to <scratch>/runs where run.dir is not set, and what the Hugging Face
    libraries keep to <scratch>/huggingface."""
    network_interface: str | None = None
    """Network that the processes meet in, as ib0 (default: what NCCL and gloo choose)."""

    def module_lines(self) -> list[str]:
        """Shell that makes `module` known, which a login shell does, and a job has none."""
        if not self.modules and not any(re.match(r"(module|ml)\b", line) for line in self.setup or ()):
            return []
        return ["if ! type module >/dev/null 2>&1; then  # which a login shell would know",
                '    for file in "$MODULESHOME/init/bash" "$LMOD_PKG/init/bash" /etc/profile.d/{z00_lmod,lmod,modules}.sh \\',
                "        /usr/share/{lmod/lmod,modules,Modules}/init/bash; do",
                '        [ ! -r "$file" ] || { source "$file"; break; }',
                "    done",
                "fi"]

    def setup_lines(self, container: str | None) -> list[str]:
        """The shell's part in it, for a job in that container."""
        activate = [] if container else [f"source {shlex.quote(_activate())}"]
        return [*(f"module load {module}" for module in self.modules), *(activate if self.setup is None else self.setup)]

    def scratch_folder(self) -> str | None:
        return os.path.expandvars(os.path.expanduser(self.scratch)) if self.scratch else None


def _activate() -> str:
    own = Path(sys.prefix, "bin", "activate")
    in_clone = OF_THE_REPOSITORY.is_file() or Path(".venv").is_dir() or not own.is_file()
    return ".venv/bin/activate" if in_clone or sys.prefix == sys.base_prefix else str(own)


def user_file() -> Path:
    """Where a user keeps the site's settings for all their checkouts."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "genscale" / "site.yaml"


def read_site(file: str | None = None) -> Site:
    """The site's settings: of `file`, or else the user's own, or else those of `launch/site.yaml` here, or else the defaults.

    Raises:
        UserError: the file cannot be read, or a setting in it is not one, or holds a token.
    """
    if file is not None:
        return _read(Path(file))
    return next((_read(path) for path in (user_file(), OF_THE_REPOSITORY) if path.is_file()), Site())


def _read(path: Path) -> Site:
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UserError(f"--site: cannot read '{path}' ({error.strerror})") from None
    except Unreadable as error:
        raise UserError(f"--site: '{path}' {error}") from None
    if not isinstance(content or {}, dict):
        raise UserError(f"--site: '{path}' must hold settings like 'partition: gpu', not a {type(content).__name__}")
    kinds, defaults = get_type_hints(Site), {each.name: each for each in dataclasses.fields(Site)}
    settings = {}
    for key, value in (content or {}).items():
        if key == OF_REWARDS:
            continue
        if key not in defaults:
            raise UserError(f"site.{key}: unknown key in {path}{nearest(str(key), defaults)}")
        _check_has_no_secret(str(key), value, path)
        settings[key] = _checked(str(key), value, kinds[key], path)
    return Site(**settings)


def _check_has_no_secret(key: str, value: Any, path: Path) -> None:
    """All of a site stands in the scripts of its jobs, which others may read."""
    if isinstance(value, dict):
        names = [name for name, each in value.items() if _SECRET_NAME.fullmatch(str(name)) or has_mask(masked(str(each)))]
    else:
        lines = map(str, value if isinstance(value, list) else [value])
        names = [found["name"] for line in lines for found in _SECRET_IN_LINE.finditer(line)]
    if names:
        raise UserError(f"site.{key}: {names[0]} in {path} would be kept in the script of every job; take it out, and export "
                        "it in your shell before `genscale slurm submit`: a job has its environment (for W&B, ~/.netrc does)")


def _checked(key: str, value: Any, kind: Any, path: Path) -> Any:
    if key in ("gpus_per_node", "gres") and value is not None:
        per_node, gres = (value, None) if key == "gpus_per_node" else (None, value)
        read_gpus(per_node, gres, f"site.{key}", f"site.{key}")
        return value
    kinds = get_args(kind) if type(None) in get_args(kind) else (kind,)
    if value is None and type(None) in kinds:
        return None
    wanted = kinds[0]
    if wanted is str and isinstance(value, str) and value and value.isprintable():
        _check_text(key, value, path)
        return value
    if wanted is int and type(value) is int and value >= 1:
        return value
    if wanted == list[str] and isinstance(value, list) and all(isinstance(each, str) and each.isprintable() for each in value):
        if key == "container_mounts" and (odd := [each for each in value if not re.fullmatch(r"[^'\"\\`,]+", each)]):
            raise UserError(f"site.container_mounts: '{odd[0]}' is not a path that a job's script can hold (in {path})")
        if key == "sbatch" and (others := [line for line in value if not line.startswith("--")]):
            raise UserError(f"site.sbatch: must be options of sbatch, as --qos=long, not '{others[0]}' (in {path})")
        return value
    if wanted == dict[str, str] and isinstance(value, dict) and all(
            re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII) and isinstance(each, (str, int, float))
            for name, each in value.items()):
        return {name: each if isinstance(each, str) else json.dumps(each) for name, each in value.items()}
    words = {str: "a text", int: "a whole number", list[str]: "a list of texts, as [a, b]",
             dict[str, str]: "a mapping of variables, as {NAME: value}"}
    raise UserError(f"site.{key}: must be {words[wanted]}, not {value!r} (in {path})")


def _check_text(key: str, value: str, path: Path) -> None:
    if key == "container_kind" and value not in CONTAINER_KINDS:
        raise UserError(f"site.container_kind: '{value}' is not one of {', '.join(CONTAINER_KINDS)} (in {path})")
    if key in ("partition", "account") and not is_slurm_name(value):
        raise UserError(f"site.{key}: '{value}' is not a name that Slurm could have (in {path})")
    if key == "container_command":
        try:
            broken = any(re.search(r"['\"\\`]", word) for word in shlex.split(value))
        except ValueError:  # a quote that is not closed
            broken = True
        if broken:
            raise UserError(f"site.container_command: {value} is no command that a job's script can hold: quotes only "
                            f"around whole words, no backslash (in {path})")


def is_slurm_name(word: str) -> bool:
    """Whether it may be the name of a partition (or of several, with commas) or an account."""
    return re.fullmatch(r"[\w.,+-]+", word) is not None
