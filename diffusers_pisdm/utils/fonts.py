"""Writes text of any script into pictures: each character in the first font that has it."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


MISSING = "\U0010ffff"  # a code point that no font may have
SEPARATORS = set(" /-_,.…")  # that keep words apart
MOST_FONTS = 100  # of the system that are read, as each takes hundredths of a second
BITMAP_SIZES = (109, 136, 160, 96, 64)  # of colour emoji: such fonts have one size each


class LabelFont:
    """
    A font of a given size that falls back to others: Pillow's own, then those that Python packages bring (matplotlib's
    DejaVu Sans; matplotlib-fontja's for Japanese and Chinese), then the system's. What none of them has is written as
    its Unicode name or code, set apart by spaces, never as a box.

    Args:
        size (`float`): In pixels.
    """

    def __init__(self, size: float):
        self.size = size

    def getlength(self, text: str) -> float:
        """The width of a line of text in pixels."""
        return sum(self._width(font, run) for font, run in self._runs(text))

    def draw(self, picture: Image.Image, position: tuple[float, float], text: str, fill: tuple[int, int, int]) -> None:
        """Draws a line of text into an RGB picture; `position` is its top left corner."""
        left, top = position
        baseline = top + _default(self.size).getmetrics()[0]
        for font, run in self._runs(text):
            if font.size == self.size:
                ImageDraw.Draw(picture).text((left, baseline), run, fill=fill, font=font, anchor="ls")
            else:  # a bitmap font
                glyphs = _draw_bitmaps(font, run, self.size)
                picture.paste(glyphs, (round(left), round(baseline - 0.9 * self.size)), glyphs)
            left += self._width(font, run)

    def _width(self, font: ImageFont.FreeTypeFont, run: str) -> float:
        return font.getlength(run) * self.size / font.size

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        pieces, before, was_words = [], " ", False
        for char in text:
            font = find_font(char, self.size)
            is_words = font is None
            if (is_words or was_words) and not {before, char} & SEPARATORS:
                pieces.append((_default(self.size), " "))
            pieces.append((_default(self.size), describe(char)) if is_words else (font, char))
            before, was_words = char, is_words
        return [(font, "".join(char for _, char in run)) for font, run in groupby(pieces, key=lambda piece: piece[0])]


def describe(char: str) -> str:
    """What to write for a character that no font has: `red apple`, or its code where the name is no help."""
    name = unicodedata.name(char, "")
    # Letters are one of a word: "cjk unified ideograph-732b" would fill the line.
    return f"U+{ord(char):04X}" if not name or unicodedata.category(char)[0] in "LM" else name.lower()


@lru_cache(maxsize=4096)
def find_font(char: str, size: float) -> ImageFont.FreeTypeFont | None:
    """The first font that has a character; `None` if no font has it."""
    default = _default(size)
    if char.isspace() or _default_has(char):
        return default
    paths = (path for path in _font_files() if ord(char) in _code_points(path))
    return next((font for font in (_open(path, size) for path in paths) if font is not None), None)


@lru_cache(maxsize=16)
def _default(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _default_has(char: str) -> bool:
    # It comes without a file whose table could be read: is it drawn otherwise than what is missing?
    found, missing = (_default(16).getmask(text) for text in (char, MISSING))
    return (found.size, bytes(found)) != (missing.size, bytes(missing)) and not unicodedata.combining(char)


@lru_cache(maxsize=1)
def _font_files() -> list[Path]:
    if find_spec("matplotlib") is None:  # also brings fontTools
        return []
    import matplotlib
    from matplotlib.font_manager import findSystemFonts

    files = [Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")]
    japanese = find_spec("matplotlib_fontja")
    if japanese is not None and japanese.origin is not None:
        files += sorted(Path(japanese.origin).parent.rglob("*.ttf"))
    # Emoji and regular faces first: bold or italic ones only if there is no other.
    slanted = ("Bold", "Italic", "Oblique")
    found = sorted(
        map(Path, findSystemFonts()),
        key=lambda path: ("Emoji" not in path.stem, any(word in path.stem for word in slanted), path),
    )
    return files + found[:MOST_FONTS]


@lru_cache(maxsize=512)
def _code_points(path: Path) -> frozenset[int]:
    from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            return frozenset(font.getBestCmap() or ())
    except (OSError, TTLibError):
        return frozenset()


@lru_cache(maxsize=512)
def _open(path: Path, size: float) -> ImageFont.FreeTypeFont | None:
    for candidate in (size, *BITMAP_SIZES):
        try:
            return ImageFont.truetype(path, candidate)
        except OSError:
            continue
    return None


def _draw_bitmaps(font: ImageFont.FreeTypeFont, text: str, size: float) -> Image.Image:
    width = max(1, round(font.getlength(text)))
    canvas = Image.new("RGBA", (width, round(1.2 * font.size)))
    ImageDraw.Draw(canvas).text((0, font.size), text, font=font, anchor="ls", embedded_color=True)
    scale = size / font.size
    return canvas.resize(
        (max(1, round(width * scale)), max(1, round(canvas.height * scale))), Image.Resampling.LANCZOS
    )
