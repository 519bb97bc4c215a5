"""Sets of images that are there as a whole: digits and folders of image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from genscale.data.image_labels import Classes, classes_of, composed, numbered
from genscale.data.image_sets import ArraySet, FileSet
from genscale.data.image_settings import DIGITS
from genscale.data.image_shards import IMAGE_FILES, ImageSpec, files_below
from genscale.errors import UserError


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
        folders = [composed(name.partition("/")[0]) if "/" in name else None for name in names]
        known = Classes(classes, spec.where) if classes else classes_of(folders, names, spec.where)
        if len(known.names) == 1:
            raise UserError(f"data.labels=true: all images of {spec.where} lie in its folder {known.names[0]}; give the folder "
                            "that holds one folder for each class, or set data.labels to false")
        labels = numbered(folders, names, known)
    return FileSet(root, names, [size for _, size in files], labels, known.names if known else None, spec.where,
                   spec.max_image_bytes)
