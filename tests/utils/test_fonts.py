"""Labels in any script: no character comes out as the box of a missing glyph."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from diffusers_pisdm.utils import fonts
from diffusers_pisdm.utils.fonts import LabelFont, describe, find_font


@pytest.fixture
def system_fonts(monkeypatch):
    """No fonts but Pillow's and those of Python packages."""
    for cached in (fonts.find_font, fonts._font_files):
        cached.cache_clear()
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    yield
    for cached in (fonts.find_font, fonts._font_files):
        cached.cache_clear()


def drawn(text: str) -> np.ndarray:
    picture = Image.new("RGB", (200, 24), "white")
    LabelFont(12).draw(picture, (2, 2), text, (0, 0, 0))
    return np.asarray(picture)


@pytest.mark.usefixtures("system_fonts")
@pytest.mark.parametrize("text", ["Geräte", "жук", "Ωμέγα", "اليد", "ספר", "♥★→"])
def test_scripts_that_matplotlibs_font_has(text):
    pytest.importorskip("matplotlib")
    runs = LabelFont(12)._runs(text)
    assert "".join(run for _, run in runs) == text
    assert len(runs) <= 3 and all(font is find_font(char, 12) for font, run in runs for char in run)
    assert not np.array_equal(drawn(text), drawn(fonts.MISSING * len(text)))


@pytest.mark.usefixtures("system_fonts")
def test_what_no_font_has_is_named():
    assert find_font("\U0001f34e", 12) is None
    assert describe("\U0001f34e") == "red apple" and describe("\u0939") == "U+0939"
    assert np.array_equal(drawn("a \U0001f34e"), drawn("a red apple"))
    assert np.array_equal(drawn("noto/\U0001f34ea\U0001f34e\U0001f34e"), drawn("noto/red apple a red apple red apple"))
    assert LabelFont(12).getlength("\U0001f34e") == ImageFont.load_default(12).getlength("red apple")


@pytest.mark.usefixtures("system_fonts")
def test_only_so_many_fonts_are_read(monkeypatch):
    pytest.importorskip("matplotlib")
    many = [f"/fonts/{name}.ttf" for name in (*range(1000), "NotoColorEmoji")]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: many)
    read = []
    monkeypatch.setattr(fonts, "_code_points", lambda path: read.append(str(path)) or frozenset())
    assert find_font("\U0001f34e", 12) is None
    assert many[-1] in read and len([path for path in read if path in many]) == fonts.MOST_FONTS


def test_ascii_is_drawn_as_pillow_draws_it():
    font, picture = ImageFont.load_default(12), Image.new("RGB", (200, 24), "white")
    fonts.ImageDraw.Draw(picture).text((2, 2), "fluent3d/animal", fill=(0, 0, 0), font=font)
    assert np.array_equal(drawn("fluent3d/animal"), np.asarray(picture))
    assert LabelFont(12).getlength("fluent3d/animal") == font.getlength("fluent3d/animal")


def test_a_line_in_two_fonts_goes_on_where_the_first_ends():
    pytest.importorskip("matplotlib")
    both, first = drawn("lä"), drawn("l")
    width = round(LabelFont(12).getlength("l"))
    assert np.array_equal(both[:, : 2 + width - 1], first[:, : 2 + width - 1])
    assert (both[:, 2 + width :] < 128).any()
