"""Draws scan paths (CSM) and padding tokens (PT)."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .scan_paths import SCAN_DIRECTIONS, check_scan_direction, scan_path


START_COLOUR, END_COLOUR = (24, 90, 188), (230, 96, 20)  # the path fades from the first to the second
JUMP_COLOUR = (200, 205, 212)  # steps between tokens that are not neighbours
CELL_COLOUR, CELL_OUTLINE = (246, 247, 249), (221, 224, 229)
PAD_COLOUR = (255, 214, 102)
TITLE_COLOUR = (40, 40, 40)
PANELS_A_ROW = 4
OVERSAMPLING = 3  # drawn at this scale, then reduced: PIL draws without antialiasing


def draw_scan_paths(
    height: int,
    width: int,
    directions: tuple[str, ...] = SCAN_DIRECTIONS,
    snake: bool = False,
    num_padding_tokens: int = 1,
    cell_size: int = 24,
) -> Image.Image:
    """
    Draws the order in which scans visit a grid of tokens: one panel per direction, four panels per row.

    A path starts at the large dot and fades from blue to orange; arrows show its direction. Grey lines are jumps
    between tokens that are not neighbours. Padding tokens are the yellow squares at the end of each line.

    Args:
        height (`int`): Rows of the grid, at least 1.
        width (`int`): Columns of the grid, at least 1.
        directions (`tuple[str, ...]`, defaults to all eight): The [`SCAN_DIRECTIONS`] to draw, at least one.
        snake (`bool`, defaults to `False`): Whether every second line is walked backwards.
        num_padding_tokens (`int`, defaults to 1): Padding tokens at the end of every line, 0 or more.
        cell_size (`int`, defaults to 24): Side of a token in pixels, at least 8.

    Returns:
        `PIL.Image.Image`: an RGB picture.

    Raises:
        ValueError: A direction is unknown, none is given, or `cell_size` is below 8.
    """
    if len(directions) == 0:
        raise ValueError(f"`directions` is empty: name at least one of {', '.join(SCAN_DIRECTIONS)}.")
    for direction in directions:
        check_scan_direction(direction)
    if cell_size < 8:
        raise ValueError(f"`cell_size` must be at least 8 pixels, got {cell_size}.")
    panels = [
        _draw_panel(height, width, direction, snake, num_padding_tokens, cell_size * OVERSAMPLING)
        for direction in directions
    ]
    columns = min(PANELS_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    panel_width, panel_height = panels[0].size
    picture = Image.new("RGB", (columns * panel_width, rows * panel_height), "white")
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % columns * panel_width, i // columns * panel_height))
    return picture.resize((picture.width // OVERSAMPLING, picture.height // OVERSAMPLING), Image.Resampling.LANCZOS)


def _token_cells(
    height: int, width: int, direction: str, snake: bool, num_padding_tokens: int
) -> list[tuple[int, int, bool]]:
    """Row, column and whether it is a padding token for each token in scan order; padding lies outside the grid."""
    axis, vertical, horizontal = direction.split("_")
    forwards = (horizontal if axis == "row" else vertical) in ("left", "top")
    line_length = (width if axis == "row" else height) + num_padding_tokens

    cells = []
    for position, token in enumerate(scan_path(height, width, direction, snake, num_padding_tokens).tolist()):
        if token < height * width:
            cells.append((*divmod(token, width), False))
            continue
        line = position // line_length
        step = 1 if forwards != (snake and line % 2 == 1) else -1
        row, column, _ = cells[-1]
        cells.append((row, column + step, True) if axis == "row" else (row + step, column, True))
    return cells


def _draw_panel(
    height: int, width: int, direction: str, snake: bool, num_padding_tokens: int, cell: int
) -> Image.Image:
    cells = _token_cells(height, width, direction, snake, num_padding_tokens)
    font = ImageFont.load_default(size=0.6 * cell)
    margin = (num_padding_tokens + 0.75) * cell
    title_height = 1.2 * cell
    title_width = max(font.getlength(name) for name in SCAN_DIRECTIONS) + cell
    panel_width = round(max(width * cell + 2 * margin, title_width))
    left, top = (panel_width - width * cell) / 2, title_height + margin
    panel = Image.new("RGB", (panel_width, round(top + height * cell + margin)), "white")
    draw = ImageDraw.Draw(panel)
    draw.text((panel_width / 2, 0.7 * cell), direction, TITLE_COLOUR, font, anchor="mm")

    for row, column, is_pad in cells:
        x, y = left + column * cell, top + row * cell
        inset = 0.28 * cell if is_pad else 0.04 * cell
        box = (x + inset, y + inset, x + cell - inset, y + cell - inset)
        draw.rounded_rectangle(
            box,
            radius=0.1 * cell,
            fill=PAD_COLOUR if is_pad else CELL_COLOUR,
            outline=None if is_pad else CELL_OUTLINE,
            width=max(1, cell // 24),
        )

    centres = [(left + (column + 0.5) * cell, top + (row + 0.5) * cell) for row, column, _ in cells]
    steps = list(zip(cells, cells[1:], centres, centres[1:]))
    are_jumps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) > 1 for a, b, _, _ in steps]
    for (_, _, start, end), is_jump in zip(steps, are_jumps):
        if is_jump:
            draw.line((*start, *end), JUMP_COLOUR, max(1, cell // 16))
    for i, ((_, _, start, end), is_jump) in enumerate(zip(steps, are_jumps)):
        if not is_jump:
            _draw_arrow(draw, start, end, _mix(i / len(steps)), cell)
    (x, y), radius = centres[0], 0.26 * cell
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), START_COLOUR)
    return panel


def _mix(share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(START_COLOUR, END_COLOUR))


def _draw_arrow(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: tuple[int, ...],
    cell: int,
) -> None:
    """An arrow between two neighbours, with its head in the middle."""
    draw.line((*start, *end), colour, max(2, cell // 9))
    dx, dy = (end[0] - start[0]) / cell, (end[1] - start[1]) / cell  # of length 1
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    size = 0.2 * cell
    tip = (x + dx * size, y + dy * size)
    base = (x - dx * size / 2, y - dy * size / 2)
    draw.polygon(
        [tip, (base[0] - dy * size, base[1] + dx * size), (base[0] + dy * size, base[1] - dx * size)], fill=colour
    )
