"""Labelled grids of small images, for the demo, the training script's sample grids and the docs."""

from PIL import Image

from .fonts import LabelFont
from .messages import count_of, one_line
from .pixel_modes import on_white


BACKGROUND = "white"
LABEL_COLOUR = (70, 70, 70)
TITLE_COLOUR = (0, 0, 0)
GAP = 6  # pixels between cells and around the grid
LABEL_FONT_SIZE = 11
TITLE_FONT_SIZE = 16
ELLIPSIS = "…"
INVISIBLE = dict.fromkeys(map(ord, "\ufe0e\ufe0f\u200d"))  # say how to draw or join emoji


def make_image_grid(
    images: list[Image.Image],
    labels: list[str] | None,
    columns: int,
    cell_size: int = 64,
    title: str | None = None,
) -> Image.Image:
    """
    Draws images into one picture, row by row, each in a square cell with its label below.

    Args:
        images (`list[PIL.Image.Image]`):
            At least one image, of any size and mode. Images smaller than `cell_size` are scaled up by the largest
            integer factor that fits, with nearest neighbour, so their pixels stay visible; larger ones are scaled
            down. Transparent images are drawn on white.
        labels (`list[str]`, *optional*):
            One label per image. If a label is wider than its cell, only its end is kept, after an ellipsis, since
            class names such as `fluent3d/animal-mammal` differ there. Line breaks and what cannot be printed are shown
            as escapes, characters that no installed font has by their Unicode name. `None` draws no labels and
            reserves no space.
        columns (`int`):
            Images per row, at least 1. The last row may be shorter.
        cell_size (`int`, defaults to `64`):
            Side of a cell in pixels, at least 1.
        title (`str`, *optional*):
            A line above the grid.

    Returns:
        `PIL.Image.Image`: An RGB picture.

    Raises:
        ValueError: There are no images, `columns` or `cell_size` is below 1, or the number of labels differs from the
            number of images.
    """
    if not images:
        raise ValueError("`images` is empty: a grid needs at least one image.")
    if columns < 1:
        raise ValueError(f"`columns` has to be at least 1 but is {columns}.")
    if cell_size < 1:
        raise ValueError(f"`cell_size` has to be at least 1 pixel but is {cell_size}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(
            f"`labels` has {count_of(len(labels), 'text')} for {count_of(len(images), 'image')}: pass one label"
            " per image."
        )

    label_font = LabelFont(LABEL_FONT_SIZE)
    title_font = LabelFont(TITLE_FONT_SIZE)
    label_height = LABEL_FONT_SIZE + GAP if labels is not None else 0
    title_height = TITLE_FONT_SIZE + 2 * GAP if title else 0

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = columns * (cell_size + GAP) + GAP
    height = title_height + rows * (cell_size + label_height + GAP) + GAP
    grid = Image.new("RGB", (width, height), BACKGROUND)

    if title:
        text = shorten_to_width(title, title_font, width - 2 * GAP, keep="start")
        title_font.draw(grid, (GAP, GAP), text, TITLE_COLOUR)
    for index, image in enumerate(images):
        left = GAP + (index % columns) * (cell_size + GAP)
        top = title_height + GAP + (index // columns) * (cell_size + label_height + GAP)
        cell = fit_into_cell(image, cell_size)
        grid.paste(cell, (left + (cell_size - cell.width) // 2, top + (cell_size - cell.height) // 2))
        if labels is not None:
            text = shorten_to_width(labels[index], label_font, cell_size, keep="end")
            offset = (cell_size - label_font.getlength(text)) / 2
            label_font.draw(grid, (left + offset, top + cell_size + 1), text, LABEL_COLOUR)
    return grid


def fit_into_cell(image: Image.Image, cell_size: int) -> Image.Image:
    """
    Scales an image to fit a square cell, keeping its aspect ratio, as RGB on white: enlarged by an integer factor with
    nearest neighbour, or reduced with an area filter.
    """
    image = on_white(image).convert("RGB")
    longest = max(image.size)
    if longest <= cell_size:
        factor = cell_size // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = [max(1, round(side * cell_size / longest)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX)


def shorten_to_width(text: str, font: LabelFont, width: int, keep: str = "end") -> str:
    """
    Shortens a line of text to at most `width` pixels: the longest part of its start or end (`keep`) that fits with an
    ellipsis, or nothing if not even the ellipsis fits.
    """
    longest = width + 1  # characters: wider than `width`, so the rest is left out in any case
    text = one_line((text[:longest] if keep == "start" else text[-longest:]).translate(INVISIBLE))
    if font.getlength(text) <= width:
        return text
    for length in range(len(text) - 1, -1, -1):
        shortened = text[:length] + ELLIPSIS if keep == "start" else ELLIPSIS + text[len(text) - length :]
        if font.getlength(shortened) <= width:
            return shortened
    return ""
