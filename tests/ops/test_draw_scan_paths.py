import numpy as np
import pytest
from PIL import Image

from diffusers_pisdm.ops import SCAN_DIRECTIONS, draw_scan_paths
from diffusers_pisdm.ops.draw_scan_paths import END_COLOUR, PAD_COLOUR, START_COLOUR
from examples.draw_scan_paths import main


CELL = 24


def blobs(picture, colour, tolerance=12):
    """Centres (x, y) of the connected areas of a colour."""
    difference = np.abs(np.asarray(picture, dtype=int) - colour).max(axis=2)  # (height, width)
    wanted = {(x, y) for y, x in np.argwhere(difference <= tolerance).tolist()}
    centres = []
    while wanted:
        area, edge = [], [wanted.pop()]
        while edge:
            x, y = edge.pop()
            area.append((x, y))
            near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & wanted
            wanted -= near
            edge.extend(near)
        if len(area) > 20:
            centres.append((sum(x for x, _ in area) / len(area), sum(y for _, y in area) / len(area)))
    return centres


def test_one_panel_a_direction_four_a_row():
    one = draw_scan_paths(3, 4, directions=SCAN_DIRECTIONS[:1])
    three = draw_scan_paths(3, 4, directions=SCAN_DIRECTIONS[:3])
    eight = draw_scan_paths(3, 4)
    assert (one.mode, three.height, eight.height) == ("RGB", one.height, pytest.approx(2 * one.height, abs=2))
    assert three.width == pytest.approx(3 * one.width, abs=3)
    assert eight.width == pytest.approx(4 * one.width, abs=4)


@pytest.mark.parametrize("snake", [False, True])
@pytest.mark.parametrize("direction", SCAN_DIRECTIONS)
def test_start_is_marked_in_its_corner(direction, snake):
    picture = draw_scan_paths(3, 3, (direction,), snake=snake, num_padding_tokens=0, cell_size=CELL)
    _, vertical, horizontal = direction.split("_")
    ((x, y), *_) = blobs(picture, START_COLOUR)
    # The grid is centred; below the title of 1.2 cells and a margin of 0.75.
    column = {"left": 0, "right": 2}[horizontal]
    row = {"top": 0, "bottom": 2}[vertical]
    assert abs(x - (picture.width / 2 + (column - 1) * CELL)) < CELL / 2
    assert abs(y - ((1.2 + 0.75 + row + 0.5) * CELL)) < CELL / 2


def test_path_ends_in_the_end_colour():
    picture = draw_scan_paths(4, 4, ("row_top_left",), num_padding_tokens=0)
    assert blobs(picture, END_COLOUR, tolerance=25)


@pytest.mark.parametrize("direction", ["row_top_left", "row_bottom_right", "column_top_right", "column_bottom_left"])
def test_pads_are_drawn_outside_the_grid_at_the_end_of_each_line(direction):
    height, width, num_pads = 3, 2, 2
    with_pads = draw_scan_paths(height, width, (direction,), num_padding_tokens=num_pads, cell_size=CELL)
    # The path crosses a pad and may cut it in two: count the pads by the cells they lie in.
    left = (with_pads.width - width * CELL) / 2
    top = (1.2 + num_pads + 0.75) * CELL
    cells = {((y - top) // CELL, (x - left) // CELL) for x, y in blobs(with_pads, PAD_COLOUR)}
    axis, vertical, horizontal = direction.split("_")
    if axis == "row":
        expected = {(row, column) for row in range(3) for column in ((2, 3) if horizontal == "left" else (-1, -2))}
    else:
        expected = {(row, column) for column in range(2) for row in ((3, 4) if vertical == "top" else (-1, -2))}
    assert cells == expected
    assert not blobs(draw_scan_paths(height, width, (direction,), num_padding_tokens=0), PAD_COLOUR)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^`directions` is empty: name at least one of row_top_left, "):
        draw_scan_paths(2, 2, directions=())
    with pytest.raises(ValueError, match=r"^`cell_size` must be at least 8 pixels, got 4\.$"):
        draw_scan_paths(2, 2, cell_size=4)
    with pytest.raises(ValueError, match=r"^`spiral` is not a scan direction\."):
        draw_scan_paths(2, 2, directions=("spiral",))


def test_example_writes_the_picture(tmp_path, capsys):
    path = tmp_path / "new folder" / "paths.png"
    main(["--height", "1", "--width", "3", "--snake", "--output", str(path)])
    assert Image.open(path).tobytes() == draw_scan_paths(1, 3, snake=True).tobytes()
    assert capsys.readouterr().out == f"Drew 8 scan paths of a 1 x 3 grid: {path}\n"
