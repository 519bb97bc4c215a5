"""Texts on pictures: in fonts of this machine that have their letters, on as many lines as they need."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont, features

MOST_LETTERS = 48
"""Most letters of a class's name on a picture."""
NAMED = 8
"""Classes at most that a message lists."""
JOINED = ((0x0590, 0x0DFF), (0x0F00, 0x109F), (0x1780, 0x18AF), (0xFB1D, 0xFDFF), (0xFE70, 0xFEFF))
"""Scripts that are written from the right, or whose letters change beside others: Arabic, Hebrew, Devanagari, ..."""


class Pen:
    """Writes texts of one size in lines no wider than asked.

    Attributes:
        line: height of a line, in pixels; of the texts given at the start.
    """

    def __init__(self, size: int, texts: Sequence[str]) -> None:
        self._size = size
        metrics = [self._font(path).getmetrics() for path in {None, *(path for text in texts for path, _ in _runs(text))}]
        self._ascent = max(ascent for ascent, _ in metrics)
        self.line = self._ascent + max(descent for _, descent in metrics) + 1

    def wrapped(self, text: str, width: int) -> list[str]:
        """The lines of a text, broken between words where that can be."""
        lines = [""]
        for word in re.findall(r"[^\s_./-]+[\s_./-]*|[\s_./-]+", text):
            if self.width(lines[-1] + word.rstrip()) <= width:
                lines[-1] += word
                continue
            lines += [""] * bool(lines[-1])
            for letter in re.findall(r".[\u0300-\u036f\u200d\ufe0f]*", word):
                if lines[-1] and self.width(lines[-1] + letter.rstrip()) > width:
                    lines.append("")
                lines[-1] += letter
        return [line.strip() for line in lines if line.strip()]

    def width(self, text: str) -> int:
        """In pixels."""
        return math.ceil(sum(self._font(path).getlength(part) for path, part in _runs(text)))

    def write(self, draw: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[str], ink: int) -> None:
        """The lines below one another, the first at `top`."""
        for number, line in enumerate(lines):
            x, base = float(left), top + number * self.line + self._ascent
            for path, part in _runs(line):
                draw.text((x, base), part, fill=(ink,) * 3, font=self._font(path), anchor="ls")
                x += self._font(path).getlength(part)

    def _font(self, path: str | None) -> ImageFont.FreeTypeFont:
        return _opened(path, self._size)


def class_captions(names: Sequence[str]) -> tuple[list[str], str | None]:
    """What stands for each class on a picture, no two alike, and one line about the names that cannot be drawn, if any.

    A class whose name no font has the letters of is its number, as in `#3`; the middle of a very long name is left out.
    """
    captions, missing = [], []
    for number, name in enumerate(names):
        caption = " ".join(unicodedata.normalize("NFC", name).split())
        if not caption or not can_draw(caption):
            missing.append(f"#{number} is {name if name.isprintable() and name else ascii(name)}")
            caption = f"#{number}"
        elif len(caption) > MOST_LETTERS:
            caption = f"{caption[: MOST_LETTERS // 2]}...{caption[3 - MOST_LETTERS // 2 :]}"
        captions.append(caption)
    times = Counter(captions)
    captions = [f"{text} #{number}" if times[text] > 1 else text for number, text in enumerate(captions)]
    if not missing:
        return captions, None
    more = f", and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return captions, (f"no font of this machine has the letters of {len(missing)} of the {len(names)} classes, which pictures "
                      f"number ({', '.join(missing[:NAMED])}{more}); install one that has, such as Noto Sans CJK or Noto Emoji")


def can_draw(text: str) -> bool:
    """Whether fonts here have all letters of a text, and Pillow can join them."""
    return not missing_letters(text)


def missing_letters(text: str) -> set[str]:
    """The characters that cannot be drawn here."""
    return {letter for letter in text if not _is_plain(letter) and not _is_mark(letter) and _font_of(letter) is None}


def font_files(text: str) -> list[str]:
    """The font files that the letters of a text take, without Pillow's own."""
    return list(dict.fromkeys(path for path, _ in _runs(text) if path is not None))


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _is_mark(letter: str) -> bool:
    """Shows nothing of its own: joiners, variation selectors."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


@cache
def _runs(text: str) -> tuple[tuple[str | None, str], ...]:
    """The text in parts of one font each (None: Pillow's own); in one part where one font has all of it."""
    if _is_plain(text):
        return ((None, text),)
    text = "".join(letter for letter in text if not "\ufe00" <= letter <= "\ufe0f")
    own = [_font_of(letter) for letter in text if not _is_plain(letter) and not _is_mark(letter)]
    for path in dict.fromkeys(path for path in own if path):
        if all(_is_mark(letter) or ord(letter) in _letters(path) for letter in text):
            return ((path, text),)
    paths, last = [], None
    for letter in text:
        last = last if _is_mark(letter) or unicodedata.combining(letter) else None if _is_plain(letter) else _font_of(letter)
        paths.append(last)
    return tuple((path, "".join(letter for _, letter in part))
                 for path, part in groupby(zip(paths, text, strict=True), key=lambda pair: pair[0]))


@cache
def _font_of(letter: str) -> str | None:
    """The first font file that has it, where it can be set at all."""
    joined = any(first <= ord(letter) <= last for first, last in JOINED)
    if joined and not (features.check("raqm") and features.check("fribidi")):
        return None
    return next((path for path in _fonts() if ord(letter) in _letters(path)), None)


@cache
def _fonts() -> list[str]:
    """Font files: the one that comes with Matplotlib, then those of the machine, upright and of usual weight first."""
    from matplotlib import get_data_path
    from matplotlib.font_manager import findSystemFonts

    # A last resort has a box for every letter.
    found = [path for path in findSystemFonts() if "lastresort" not in path.lower()]
    found.sort(key=lambda path: (bool(re.search("bold|italic|oblique|mono|black|thin|light", Path(path).stem, re.I)), path))
    return [str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), *found]


@cache
def _letters(path: str) -> frozenset[int]:
    """Code points of a font that Pillow can draw in any size; none of one that it cannot."""
    from matplotlib.ft2font import FT2Font

    try:
        _opened(path, 12).getbbox("A")
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # pictures of one size (colour emoji), a damaged file
        return frozenset()


@cache
def _opened(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size) if path is None else ImageFont.truetype(path, size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as Pillow's own always is where a size is given
    return font
