import math

import pytest
import torch

from benchmarks.measuring.patch_borders import patch_border_ratio, white_roughness


def slope():
    """A smooth ramp from left to right and from top to bottom, one unit a pixel."""
    return (100 + torch.arange(32)[:, None] + torch.arange(32)).to(torch.uint8).expand(2, 3, 32, 32)


def test_a_ramp_has_no_grid():
    assert patch_border_ratio(slope(), 4) == pytest.approx(1.0)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_steps_across_patches_are_found_in_both_directions(patch_size):
    shade = torch.arange(32) // patch_size % 2 * 2  # patches are one or three units apart from their neighbours
    for stripes in (shade[:, None].expand(32, 32), shade.expand(32, 32)):
        stepped = (slope().float() + stripes).to(torch.uint8)
        # One direction has steps of 1 + 2 and 1 - 2 across borders, the other has 1 everywhere.
        border = (1 + (3 + 1) / 2) / 2
        assert patch_border_ratio(stepped, patch_size) == pytest.approx(border, rel=0.15)
        assert patch_border_ratio(stepped[..., 1:, 1:], patch_size) < 1.1  # a pixel beside the grid


def test_edges_of_what_is_shown_are_no_grid():
    images = slope().clone()
    images[..., 16:] = 0
    assert patch_border_ratio(images, 4) == pytest.approx(1.0)


def test_a_clean_white_ground():
    images = torch.full((2, 3, 20, 20), 255, dtype=torch.uint8)
    assert white_roughness(images) == 0
    images[..., 10:, :] = 40  # what is shown does not count, nor does its edge
    assert white_roughness(images) == 0
    assert math.isnan(white_roughness(torch.full((1, 3, 20, 20), 40, dtype=torch.uint8)))


def test_dirt_on_white_counts_in_units_of_a_255th():
    images = torch.full((1, 3, 20, 20), 255, dtype=torch.uint8)
    images[..., ::2] = 251
    assert white_roughness(images) == pytest.approx(2.0)  # 4 from left to right, 0 from top to bottom
