"""Sets of images that are there as a whole: digits, .npz files and folders of image files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from genscale.data.image_labels import Classes, classes_of, numbered
from genscale.data.image_sets import ArraySet, FileSet
from genscale.data.image_settings import DIGITS
from genscale.data.image_shards import IMAGE_FILES, ImageSpec, files_below
from genscale.errors import UserError, nearest
from genscale.reading import read_json

CLASSES_FILE = "classes.json"


def digits() -> ArraySet:
    """scikit-learn's test part of the optical digits of Alpaydin and Kaynak (1998), 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return ArraySet(pixels, found.target.astype(np.int64), [str(number) for number in range(10)], DIGITS)


def image_files(spec: ImageSpec, root: Path, classes: list[str] | None) -> FileSet:
    """The image files below a folder; the class is the name of the folder right below the root.

    Args:
        classes: names of the classes; None: those of the folders.

    Raises:
        UserError: no image there, or a folder that is no class.
    """
    files = files_below(root, IMAGE_FILES, spec)
    if not files:
        raise UserError(f"{spec.where}: the folder holds no image ({' '.join(IMAGE_FILES)}), train.npz, .parquet or .tar; give "
                        "one that does")
    names = [name for name, _ in files]
    labels, known = None, None
    if spec.label:
        folders = [name.partition("/")[0] if "/" in name else None for name in names]
        known = Classes(classes, spec.where) if classes else classes_of(folders, spec.where)
        if known and len(known.names) == 1:
            raise UserError(f"data.labels=true: all images of {spec.where} lie in its folder {known.names[0]}; give the folder "
                            "that holds one folder for each class, or set data.labels to false")
        labels = numbered(folders, names, known) if known else None
    return FileSet(root, names, [size for _, size in files], labels, known.names if known else None, spec.where)


def arrays(spec: ImageSpec, path: Path, classes: list[str] | None) -> ArraySet:
    """A .npz file with `images` and perhaps `labels`; names of the classes may stand in a classes.json beside it.

    Raises:
        UserError: it cannot be read, or its arrays are of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files if name in ("images", "labels")}
            names = file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{spec.where}: {path.name} cannot be read ({type(error).__name__}: {error}); mend it") from None
    if "images" not in found:
        raise UserError(f"{spec.where}: {path.name} holds the arrays {', '.join(names)}{nearest('images', names)}; call the "
                        "one with the pixels images")
    images, labels = found["images"], found.get("labels")
    pixels = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3, 4))
    if images.dtype != np.uint8 or not pixels or not images.size:
        raise UserError(f"{spec.where}: the array images of {path.name} is {images.dtype} {images.shape}; it must be uint8 "
                        "(images, height, width) or (images, height, width, 1, 3 or 4)")
    if labels is None or not spec.label:
        return ArraySet(images, None, None, path.name)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        raise UserError(f"{spec.where}: the array labels of {path.name} is {labels.dtype} {labels.shape}; it must hold whole "
                        f"numbers or texts, one for each of the {len(images)} images")
    given = labels.tolist()
    known = Classes(classes or _beside(path) or classes_of(given, spec.where).names, spec.where)
    found_names = [f"{path.name}[{i}]" for i in range(len(given))]
    return ArraySet(images, numbered(given, found_names, known), known.names, path.name)


def _beside(path: Path) -> list[str] | None:
    try:
        names = read_json(path.parent / CLASSES_FILE)
    except (OSError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None
