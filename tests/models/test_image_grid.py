"""Many images as one picture."""

from __future__ import annotations

import numpy as np
import torch

from genscale.models.image_grid import MARGIN, grid, grid_of_rows


def tile(sheet: np.ndarray, row: int, column: int, side: int, caption: int = 0) -> np.ndarray:
    top, left = MARGIN + row * (side + MARGIN + caption) + caption, MARGIN + column * (side + MARGIN)
    return sheet[top : top + side, left : left + side]


def test_every_image_stands_in_its_place_enlarged_pixel_by_pixel():
    images = torch.rand(7, 3, 8, 8)
    sheet = grid(images)
    assert sheet.dtype == np.uint8 and sheet.shape == (3 * 34 + 2, 3 * 34 + 2, 3)
    for i, image in enumerate(images):
        expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(tile(sheet, i // 3, i % 3, 32), np.kron(expected, np.ones((4, 4, 1), np.uint8)))
    assert (tile(sheet, 2, 1, 32) == 255).all() and (sheet[:, :MARGIN] == 255).all()


def test_grey_bytes_columns_and_scale():
    images = np.arange(3 * 40 * 40, dtype=np.uint8).reshape(3, 1, 40, 40)
    sheet = grid(images, columns=5)
    assert sheet.shape == (44, 3 * 42 + 2, 3)
    assert np.array_equal(tile(sheet, 0, 2, 40), images[2].transpose(1, 2, 0).repeat(3, -1))
    assert np.array_equal(sheet, grid(torch.from_numpy(images), columns=5))
    assert np.array_equal(sheet, grid((torch.from_numpy(images) / 255), columns=5))
    assert grid(images, columns=1, scale=2).shape == (3 * 82 + 2, 84, 3)
    out_of_range = torch.full((1, 1, 32, 32), 1.7)
    out_of_range[0, 0, 0] = float("nan")
    assert (grid(out_of_range)[MARGIN + 1 : -MARGIN, MARGIN:-MARGIN] == 255).all()


def test_labels_stand_above_their_images_and_no_wider():
    images = torch.zeros(2, 1, 32, 32)
    plain, labelled = grid(images), grid(images, labels=["a very long name of a class", ""])
    caption = labelled.shape[0] - plain.shape[0]
    assert caption > 5 and labelled.shape[1] == plain.shape[1]
    heading = labelled[MARGIN : MARGIN + caption]
    assert (heading[:, MARGIN : MARGIN + 32] < 128).any()
    assert (heading[:, MARGIN + 34 :] == 255).all()
    assert (tile(labelled, 0, 0, 32, caption) == 0).all() and (tile(labelled, 0, 1, 32, caption) == 0).all()
    line = grid(images, labels=["x", ""]).shape[0] - plain.shape[0]
    assert caption >= 4 * line  # nothing of the name is cut
    rows = grid(images, columns=1, labels=["", "x"])  # only the second row has a caption
    assert rows.shape[0] == grid(images, columns=1).shape[0] + line
    assert (tile(rows, 0, 0, 32) == 0).all() and (rows[-MARGIN - 32 : -MARGIN, MARGIN:-MARGIN] == 0).all()


def test_names_that_begin_alike_are_told_apart():
    names = [f"class_{number:02}" for number in range(40)]
    sheet = grid(torch.zeros(40, 1, 8, 8), columns=40, labels=names)
    caption = sheet.shape[0] - 32 - 2 * MARGIN
    headings = {sheet[MARGIN : MARGIN + caption, MARGIN + 34 * i : MARGIN + 34 * i + 33].tobytes() for i in range(40)}
    assert len(headings) == 40


def test_names_of_rows_stand_left_of_them():
    images = torch.zeros(4, 1, 32, 32)
    named, plain = grid(images, columns=2, rows=["input", "output"]), grid(images, columns=2)
    left = named.shape[1] - plain.shape[1]
    assert np.array_equal(named[:, left + MARGIN :], plain[:, MARGIN:])
    tops = (MARGIN, MARGIN + 34)
    words = [named[top : top + 32, :left] for top in tops]
    assert all((word < 128).any() for word in words) and not np.array_equal(*words)


def test_parts_stand_on_rows_of_their_own():
    parts = {"input": torch.rand(3, 1, 32, 32), "output": torch.rand(2, 1, 32, 32)}
    white = torch.ones(1, 1, 32, 32)
    rows = torch.cat([parts["input"], white, parts["output"]])
    assert np.array_equal(grid_of_rows(parts, columns=2), grid(rows, 2, rows=["input", "input", "output"]))
