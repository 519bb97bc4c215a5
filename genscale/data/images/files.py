"""Sets of images that are there as a whole: digits and folders of image files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from genscale.data.folders import TRAINING, VALIDATION, File, Folder, divided, examples, identity, is_hidden, say_parts
from genscale.data.images.arrays import arrays
from genscale.data.images.labels import Classes, classes_of, composed, numbered
from genscale.data.images.sets import ArraySet, FileSet, ImageSet
from genscale.data.images.settings import DIGITS
from genscale.data.images.shards import ARRAYS, IMAGE
from genscale.data.images.spec import ImageSpec
from genscale.errors import UserError, as_utf8

LOG = logging.getLogger(__name__)
PRIME = 2**64 - 59
SOME_ENDINGS = ".png .jpg .webp .tif .avif"


def digits() -> ArraySet:
    """scikit-learn's test part of the optical digits of Alpaydin and Kaynak (1998), 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return ArraySet(pixels, found.target.astype(np.int64), [str(number) for number in range(10)], DIGITS)


Read = Callable[[list[str] | None], ImageSet]
"""Opens a set, under the names of the classes where they are known."""


def image_parts(spec: ImageSpec, root: Path, found: Folder) -> tuple[Read, Read | None]:
    """What to train on and what to validate on in a folder of .npz files or images.

    Raises:
        UserError: nothing there, or folders of which it is not clear what they are.
    """
    if names := [file.name for file in found.of(ARRAYS)]:
        training, held = divided(names)
        read = partial(partial, array_file, spec)
        return read(root / (training or names)[0]), read(root / held[0]) if held else None
    if files := found.of(IMAGE):
        return _image_folders(spec, root, files)
    raise UserError(f"{spec.where}: the folder holds no image ({SOME_ENDINGS} and whatever Pillow reads), train.npz, .parquet "
                    f"or .tar; {found.rest() or 'it is empty'}; give one that does")


def _image_folders(spec: ImageSpec, root: Path, files: list[File]) -> tuple[Read, Read | None]:
    """The same of image files, by the names of the folders right below the root, or below the one that they all lie in."""
    folders = _by_folder(files)
    names = [name for name in folders if name]
    training, held = divided(names)
    if not training:
        if len(folders) == 1 and names:
            inner = [file._replace(name=file.name[len(names[0]) + 1 :]) for file in files]
            if _parts_below(inner):
                return _image_folders(replace(spec, name=f"{spec.name.rstrip('/')}/{names[0]}"), root / names[0], inner)
        _refuse_parts_of_classes(spec, folders)
    if not training and len(names) == 1 and names[0].lower() in TRAINING:
        training = names
    if not training:
        if called := [name for name in names if name.lower() in (*TRAINING, *VALIDATION)]:
            _check_class(spec, called[0], folders)
        return partial(image_files, spec, root, files), None
    if len(training) > 1:
        raise UserError(f"{spec.where}: {' and '.join(map(as_utf8, training))} are both training sets by their names; give "
                        f"one of them, as {spec.name}/{as_utf8(training[0])}, and data.validation_source")
    used = [training[0], *held[:1]]
    say_parts(spec.where, training, held[:1], [name or folders[name][0].name for name in folders if name not in used])
    reads = [partial(image_files, spec, root / name, [file._replace(name=file.name[len(name) + 1 :]) for file in folders[name]])
             for name in used]
    return reads[0], reads[1] if held else None


def _by_folder(files: list[File]) -> dict[str, list[File]]:
    """Files by the name of the folder right below the root; "" for those that lie in none."""
    folders: dict[str, list[File]] = {}
    for file in files:
        top, slash, _ = file.name.partition("/")
        folders.setdefault(top if slash else "", []).append(file)
    return folders


def _parts_below(files: list[File]) -> bool:
    """Whether a training and a validation set part ways somewhere below a folder, before its files do."""
    folders = _by_folder(files)
    names = [name for name in folders if name]
    if any(divided(names)):
        return True
    return len(folders) == 1 and bool(names) and _parts_below(
        [file._replace(name=file.name[len(names[0]) + 1 :]) for file in files])


def _refuse_parts_of_classes(spec: ImageSpec, folders: dict[str, list[File]]) -> None:
    """Raises UserError where each folder has a training and a test set of its own: all would be trained on."""
    for name, files in folders.items():
        training, held = divided({file.name.split("/")[1] for file in files if file.name.count("/") > 1} if name else ())
        if training:
            shown, part, other = as_utf8(name), as_utf8(training[0]), as_utf8(held[0])
            raise UserError(f"{spec.where}: its folder {shown} has folders {part} and {other} of its own, and it is not clear "
                            f"whether {other} is to be trained on; give {spec.name}/{shown}, or a folder with {part} and "
                            f"{other} right below it")


def _check_class(spec: ImageSpec, name: str, folders: dict[str, list[File]]) -> None:
    """Whether a folder called train (or test) beside none that is called the opposite is a class, or a part of the set.

    Raises:
        UserError: it has folders of its own, as a part has.
    """
    shown, others = as_utf8(name), [other for other in folders if other not in ("", name)]
    if others and any("/" in file.name[len(name) + 1 :] for file in folders[name]):
        raise UserError(f"{spec.where}: its folder {shown} has folders of its own and lies beside {examples(others)}: it is "
                        f"not clear whether it is a part of the set or a class; give {spec.name}/{shown}, or call it otherwise")
    if others:
        LOG.warning("%s: its folder %s is read like those beside it (%s); if it is a part of the set, give %s/%s", spec.where,
                    shown, examples(others), spec.name, shown)


def image_files(spec: ImageSpec, root: Path, files: list[File], classes: list[str] | None) -> FileSet:
    """Image files below a folder; the class is the name of the folder right below it, or below the part of it that they are.

    Args:
        classes: names of the classes; None: those of the folders.

    Raises:
        UserError: a folder that is no class.
    """
    names = [file.name for file in files]
    labels, known = None, None
    if spec.label:
        _say_empty(spec, root, names)
        folders = [composed(as_utf8(name.partition("/")[0])) if "/" in name else None for name in names]
        known = Classes(classes, spec.where) if classes else classes_of(folders, names, spec.where)
        if known and len(known.names) == 1:
            raise UserError(f"data.labels=true: all images of {spec.where} lie in its folder {known.names[0]}; give the folder "
                            "that holds one folder for each class, or set data.labels to false")
        part = root.relative_to(Path(spec.name).expanduser()).as_posix()
        bearers = names if part == "." else [f"{part}/{name}" for name in names]
        labels = numbered(folders, bearers, known) if known else None
    images = FileSet(root, names, [file.size for file in files], labels, known.names if known else None, spec.where,
                     spec.max_image_bytes)
    images.places = np.fromiter((file.identity % PRIME for file in files), np.uint64, len(files))  # there may be millions
    return images


def _say_empty(spec: ImageSpec, root: Path, names: list[str]) -> None:
    """A line in the log about folders that could be classes, but for the images."""
    used = {name.partition("/")[0] for name in names}
    with os.scandir(root) as entries:
        empty = [entry.name for entry in entries if entry.name not in used and entry.is_dir() and not is_hidden(entry.name)]
    if empty:
        LOG.warning("%s: %s, which makes no class", spec.where, f"{len(empty):,} of its folders hold no image "
                    f"({examples(empty)})" if len(empty) > 1 else f"its folder {as_utf8(empty[0])} holds no image")


def array_file(spec: ImageSpec, path: Path, classes: list[str] | None) -> ArraySet:
    """The images of a .npz file; see `arrays`."""
    images = arrays(spec, path, classes)
    images.places = [identity(path)]
    return images
