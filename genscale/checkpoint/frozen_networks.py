"""The run folder's copy of its frozen networks, `frozen/<name>.safetensors`. Checkpoints hold the SHA-256 of each, and where it
came from; never the network. They hold the same of networks that judge and are not the objective's own, of which no copy is
kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from genscale.checkpoint.checkpoints import Checkpoint, sha256_of
from genscale.checkpoint.tensor_files import TensorFiles, write_tensors
from genscale.errors import UserError
from genscale.objectives.base import Objective
from genscale.parallel.materialise import Read, named_state
from genscale.parallel.processes import Processes
from genscale.rewards.entries import KEY
from genscale.writing import drafted, make_folder

FOLDER = "frozen"
Recorded = dict[str, dict[str, str]]
"""By name: `sha256` of the copy, and `origin` of the network in words."""


def copy_in(folder: Path, name: str) -> Path:
    """Where a run folder keeps its copy of a frozen network."""
    return folder / FOLDER / f"{name}.safetensors"


def keep_frozen(objective: Objective, folder: Path, checkpoint: Checkpoint | None, processes: Processes,
                pretrained: Read | None = None) -> tuple[Recorded, dict[str, Read]]:
    """Write the run folder's copies where the run begins, or check them where it goes on from a checkpoint. Collective.

    Args:
        pretrained: reads the weights that the run starts from; None: those that the objective gives.

    Returns:
        what the checkpoints of the run say of the frozen networks, and what reads the weights of each.

    Raises:
        UserError: a copy is missing, or is not the one that the checkpoint was trained with, or cannot be written.
    """
    recorded = processes.main_does(lambda: _kept(objective, folder, checkpoint, pretrained)) if objective.frozen else {}
    return recorded, {name: TensorFiles([copy_in(folder, name)]) for name in objective.frozen}


def _kept(objective: Objective, folder: Path, checkpoint: Checkpoint | None, pretrained: Read | None) -> Recorded:
    try:
        make_folder(folder / FOLDER)
        if checkpoint is None:
            return {name: _write(objective, folder, name, pretrained) for name in objective.frozen}
        recorded = recorded_in(checkpoint)
        if recorded.keys() != objective.frozen.keys():
            raise UserError(f"run.resume: the checkpoint {checkpoint.path} was trained with "
                            f"{_listed(recorded)} frozen, and this run has {_listed(objective.frozen)}; begin a new run with "
                            "another --run.name")
        for name in objective.frozen:
            found, own = find_copy(checkpoint, name, folder), copy_in(folder, name)
            if found != own:  # the checkpoint is another run's
                with drafted(own) as draft:
                    draft.write_bytes(found.read_bytes())
        return recorded
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder / FOLDER} ({error.strerror}); free some space, or set --run.dir to "
                        "another folder") from None


def _write(objective: Objective, folder: Path, name: str, pretrained: Read | None) -> dict[str, str]:
    file = copy_in(folder, name)
    with drafted(file) as draft:
        write_tensors(draft, pretrained or objective.initial_weights(name), _entries(objective.networks[name]))
        digest = sha256_of(draft)
    return {"sha256": digest, "origin": objective.frozen[name]}


def _entries(network: nn.Module) -> dict[str, Any]:
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in named_state(network)}


def same_judges(objective: Objective, checkpoint: Checkpoint | None, processes: Processes) -> Recorded:
    """What the checkpoints of the run say of the trained networks that its rewards ask. Collective.

    Raises:
        UserError: one is not what the checkpoint was trained with, or what another process has.
    """
    rewards = objective.rewards
    found = processes.gather(rewards.identities() if rewards is not None else {})
    for rank, others in enumerate(found):
        for name, own in others.items():
            if own != found[0].get(name):
                raise UserError(f"{KEY}: {name} asks {own['origin']}, where process {rank} finds another network than process "
                                "0; give all of them the same")
    if checkpoint is not None:
        check_judges(found[0], checkpoint)
    return found[0]


def check_judges(found: Recorded, checkpoint: Checkpoint) -> None:
    """Raises UserError where a network that judges is another than the checkpoint was trained with."""
    for name, wanted in (checkpoint.state().get("judges") or {}).items():
        if name in found and found[name]["sha256"] != wanted["sha256"]:
            raise UserError(f"{KEY}: {name} asks {found[name]['origin']}, which is not the network that judged what "
                            f"{checkpoint.path} was trained on (SHA-256 differs from {wanted['sha256'][:16]}...); put that "
                            "back, or begin a new run with another --run.name")


def recorded_in(checkpoint: Checkpoint) -> Recorded:
    """What a checkpoint says of the frozen networks it was trained with."""
    return dict(checkpoint.state().get("frozen") or {})


def find_copy(checkpoint: Checkpoint, name: str, folder: Path | None = None) -> Path:
    """The copy of a frozen network that the checkpoint was trained with: in its run folder (a checkpoint that was moved aside
    lies one folder deeper), or in `folder`.

    Raises:
        UserError: none is there, or another one.
    """
    wanted = recorded_in(checkpoint)[name]
    path = checkpoint.path.resolve()
    places = dict.fromkeys(copy_in(place, name) for place in [*([folder] if folder else []), *path.parents[1:3]])
    present = [place for place in places if place.is_file()]
    for place in present:
        if sha256_of(place) == wanted["sha256"]:
            return place
    origin = f" (from {wanted['origin']})" if wanted["origin"] else ""
    if present:
        raise UserError(f"{present[0]}: it is not the network {name}{origin} that {checkpoint.path} was trained with (SHA-256 "
                        f"differs from {wanted['sha256'][:16]}...); put that back")
    raise UserError(f"{copy_in(path.parents[1], name)}: missing; it is the frozen network {name}{origin} that "
                    f"{checkpoint.path} was trained with: put it back")


def _listed(names: Any) -> str:
    return ", ".join(names) or "no network"
