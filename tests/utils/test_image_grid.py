import pytest
from PIL import Image, ImageFont

from diffusers_pisdm.utils.fonts import LabelFont
from diffusers_pisdm.utils.image_grid import GAP, fit_into_cell, make_image_grid, shorten_to_width


def checkerboard(size):
    image = Image.new("RGB", (size, size), "white")
    image.putdata([(255, 0, 0) if (x + y) % 2 else (0, 0, 255) for y in range(size) for x in range(size)])
    return image


def test_every_image_lands_in_its_cell():
    colours = ["red", "green", "blue", "black", "orange"]
    images = [Image.new("RGB", (8, 8), colour) for colour in colours]
    grid = make_image_grid(images, None, columns=2, cell_size=16)
    assert grid.mode == "RGB"
    assert grid.size == (2 * (16 + GAP) + GAP, 3 * (16 + GAP) + GAP)
    for index, image in enumerate(images):
        left, top = GAP + (index % 2) * (16 + GAP), GAP + (index // 2) * (16 + GAP)
        cell = grid.crop((left, top, left + 16, top + 16))
        assert cell.getcolors() == [(256, image.getpixel((0, 0)))]
    # The sixth cell has no image and stays empty.
    left, top = GAP + 16 + GAP, GAP + 2 * (16 + GAP)
    assert grid.crop((left, top, left + 16, top + 16)).getcolors() == [(256, (255, 255, 255))]


def test_enlarging_repeats_pixels_and_invents_no_colour():
    cell = fit_into_cell(checkerboard(8), 20)
    assert cell.size == (16, 16)  # the largest whole factor: 2
    assert cell.resize((8, 8), Image.Resampling.NEAREST).tobytes() == checkerboard(8).tobytes()
    assert {colour for _, colour in cell.getcolors()} == {(255, 0, 0), (0, 0, 255)}


def test_large_images_are_reduced_and_keep_their_shape():
    assert fit_into_cell(Image.new("RGB", (256, 128)), 64).size == (64, 32)
    assert fit_into_cell(Image.new("RGB", (1, 300)), 64).size == (1, 64)


def test_transparent_images_are_laid_on_white():
    assert fit_into_cell(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4).getcolors() == [(16, (255, 255, 255))]
    assert fit_into_cell(Image.new("L", (4, 4), 7), 4).getcolors() == [(16, (7, 7, 7))]


def test_labels_and_title_are_drawn_in_their_own_room():
    images = [Image.new("RGB", (32, 32), "white")] * 3
    plain = make_image_grid(images, None, columns=3, cell_size=32)
    labelled = make_image_grid(images, ["cat", "dog", ""], columns=3, cell_size=32)
    titled = make_image_grid(images, None, columns=3, cell_size=32, title="pets")
    assert labelled.width == plain.width and labelled.height > plain.height
    assert titled.width == plain.width and titled.height > plain.height
    below = range(GAP + 32, labelled.height)
    for column, drawn in enumerate([True, True, False]):
        left = GAP + column * (32 + GAP)
        strip = labelled.crop((left, below.start, left + 32, below.stop))
        assert (len(strip.getcolors()) > 1) is drawn
    assert len(titled.crop((0, 0, titled.width, titled.height - 32 - GAP)).getcolors()) > 1


def test_long_labels_stay_inside_their_column():
    images = [Image.new("RGB", (64, 64), "white")] * 2
    grid = make_image_grid(images, ["fluent3d/animal-mammal" * 3, ""], columns=2)
    assert grid.crop((GAP + 64 + 1, 0, grid.width, grid.height)).getcolors() == [
        ((grid.width - GAP - 65) * grid.height, (255, 255, 255))
    ]


@pytest.mark.parametrize("keep, expected", [("start", "fluent"), ("end", "mammal")])
def test_shortened_text_fits_and_keeps_the_wanted_side(keep, expected):
    font = LabelFont(11)
    text = "fluent3d/animal-mammal"
    short = shorten_to_width(text, font, 64, keep=keep)
    assert font.getlength(short) <= 64 < font.getlength(text)
    assert (short.startswith(expected) if keep == "start" else short.endswith(expected)) and "…" in short
    assert shorten_to_width("ok", font, 64) == "ok"
    assert shorten_to_width(text, font, 1) == ""


def test_grid_is_only_as_wide_as_its_images():
    assert make_image_grid([checkerboard(8)], None, columns=9, cell_size=8).width == 8 + 2 * GAP


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([], None, 1), "`images` is empty"),
        (([Image.new("L", (1, 1))], None, 0), "`columns` has to be at least 1 but is 0"),
        (([Image.new("L", (1, 1))], None, 1, 0), "`cell_size` has to be at least 1 pixel but is 0"),
        (([Image.new("L", (1, 1))], ["a", "b"], 1), "`labels` has 2 texts for 1 image:"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_image_grid(*arguments)


ODD = "\u202ea\nb\x1b[31m../" + "word" * 4_000


@pytest.mark.parametrize("keep", ["start", "end"])
def test_odd_text_is_shortened_on_one_line(keep):
    """The kept part is the longest that fits: one more character would not."""
    font = LabelFont(11)
    shown = shorten_to_width(ODD if keep == "start" else ODD[::-1], font, 200, keep)
    assert shown.isprintable() and r"\n" in shown and r"\x1b" in shown
    assert font.getlength(shown) <= 200 < font.getlength(shown + "ww")


def test_long_labels_measure_no_more_text_than_fits(monkeypatch):
    measured = []
    getlength = ImageFont.FreeTypeFont.getlength
    monkeypatch.setattr(
        ImageFont.FreeTypeFont, "getlength", lambda font, text: measured.append(len(text)) or getlength(font, text)
    )
    make_image_grid([Image.new("RGB", (8, 8))] * 2, [ODD, "plain"], columns=2, title=ODD)
    assert max(measured) < 1_000 and len(measured) < 500
