import pytest
import torch

from diffusers_pisdm.ops import augment_low_res, upsample_low_res


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 10)])
def test_upsampling_keeps_constants_and_gives_the_size(size):
    up = upsample_low_res(torch.full((2, 3, 4, 4), 0.7), size)
    torch.testing.assert_close(up, torch.full((2, 3, *size), 0.7))


def test_upsampling_keeps_pixel_centres():
    """Twice as large: each pixel lies a quarter of the way from one source pixel to its neighbour."""
    row = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)
    up = upsample_low_res(row, (1, 6))
    assert up.flatten().tolist() == [0.0, 0.25, 0.75, 1.5, 2.5, 3.0]


def test_level_mixes_each_sample_on_its_own():
    low_res, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    out = augment_low_res(low_res, noise, torch.tensor([0.0, 0.6, 0.8]))
    assert torch.equal(out[0], low_res[0])  # level 0 leaves the image as it is
    torch.testing.assert_close(out[1], 0.8 * low_res[1] + 0.6 * noise[1])
    torch.testing.assert_close(out[2], 0.6 * low_res[2] + 0.8 * noise[2])


def test_half_precision_is_rounded_once():
    """In bfloat16 the image's weight at level 0.08, 0.997, would be 0.996 or 1."""
    generator = torch.Generator().manual_seed(0)
    low_res, noise = torch.randn(2, 2, 1, 8, 8, generator=generator).bfloat16()
    level = torch.tensor([0.08, 0.3])
    out = augment_low_res(low_res, noise, level)
    assert torch.equal(out, augment_low_res(low_res.float(), noise.float(), level).bfloat16())


def test_variance_is_kept():
    generator = torch.Generator().manual_seed(0)
    low_res, noise = torch.randn(2, 4, 1, 100, 100, generator=generator)
    out = augment_low_res(low_res, noise, torch.tensor([0.1, 0.4, 0.7, 0.99]))
    torch.testing.assert_close(out.var((1, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
