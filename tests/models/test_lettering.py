"""Texts on pictures: no box stands for a letter in silence, and no two classes look alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from genscale.models.lettering import Pen, class_captions, font_files, missing_letters

NOWHERE = "\U000f0123"
"""A code point for private use, which no font here has."""


def drawn(text: str, size: int = 20) -> np.ndarray:
    image = Image.new("RGB", (300, 40), (255,) * 3)
    Pen(size, [text]).write(ImageDraw.Draw(image), 2, 2, [text], 0)
    return np.asarray(image)[..., 0]


def test_letters_of_other_scripts_are_no_boxes():
    words = ["K\u00e4tzchen", "\u03b3\u03ac\u03c4\u03b1", "\u043a\u043e\u0448\u043a\u0430", "\u05d7\u05ea\u05d5\u05dc"]
    assert class_captions(words) == (words, None)
    for word in words:  # all boxes look alike
        letters = {drawn(letter).tobytes() for letter in word}
        assert len(letters) == len(set(word))
    assert class_captions(["e\u0301"])[0] == ["\u00e9"]


def test_a_name_without_a_font_is_a_number_and_said():
    names = ["cat", f"dog {NOWHERE}", "a\x07", "", "3"]
    captions, problem = class_captions(names)
    assert captions == ["cat", "#1", "#2", "#3", "3"]
    assert "3 of the 5 classes" in problem and "#2 is 'a\\x07'" in problem and "\n" not in problem and "install" in problem
    assert missing_letters(names[1]) == {NOWHERE}
    many = class_captions([NOWHERE + str(number) for number in range(1000)])[1]
    assert len(many) < 500 and "and 992 more" in many


def test_no_two_classes_have_one_caption():
    names = ["x" * 200 + "1", "x" * 200 + "2", "y" * 100 + "z" * 100, "y" * 101 + "z" * 100, "a b", "a  b", "\u00e9", "e\u0301"]
    captions, problem = class_captions(names)
    assert len(set(captions)) == len(names) and problem is None and max(map(len, captions)) < 60


def test_lines_hold_every_letter_and_no_more_than_their_width():
    pen = Pen(9, ["x"])
    for text in ("class_00", "Labrador_retriever", "a very long name of a class", "Pneumonoultramicroscopic", "x" * 48):
        lines = pen.wrapped(text, 31)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(pen.width(line) <= 31 for line in lines)


@pytest.fixture
def font_folder(tmp_path):
    """A home with one font, in which U+732B is a full square and A is there too."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat", "A"])
    builder.setupCharacterMap({0x732B: "cat", 0x41: "A"})
    builder.setupGlyf({".notdef": square, "cat": square, "A": square})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", "cat", "A"), (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    (tmp_path / "fonts").mkdir()
    builder.save(tmp_path / "fonts" / "Square.ttf")
    return tmp_path


def test_a_font_of_the_machine_is_found(font_folder):
    program = """
import json
from genscale.models.lettering import Pen, class_captions, font_files
from PIL import Image, ImageDraw
image = Image.new("L", (100, 40), 255)
rgb = image.convert("RGB")
text = "cat \\u732b"
Pen(20, [text]).write(ImageDraw.Draw(rgb), 0, 0, [text], 0)
print(json.dumps([class_captions([text]), font_files(text), sum(value < 30 for value in rgb.convert("L").getdata())]))
"""
    environment = {**os.environ, "XDG_DATA_HOME": str(font_folder)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    (captions, problem), files, dark = json.loads(done.stdout)
    assert captions == ["cat \u732b"] and problem is None
    if files == [str(font_folder / "fonts" / "Square.ttf")]:  # else a font for Chinese is installed here
        assert 400 <= dark <= 700  # the square, and the strokes of three letters
    assert font_files("plain") == []
