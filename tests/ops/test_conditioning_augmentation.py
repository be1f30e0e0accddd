import pytest
import torch

from diffusers_pisdm.ops import augment_low_res, image_to_residual, residual_to_image, upsample_low_res


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (6, 10)])
def test_upsampling_keeps_constants_and_gives_the_size(size):
    up = upsample_low_res(torch.full((2, 3, 4, 4), 0.7), size)
    torch.testing.assert_close(up, torch.full((2, 3, *size), 0.7))


def test_upsampling_keeps_pixel_centres():
    """Twice as large: each pixel lies a quarter of the way from one source pixel to its neighbour."""
    row = torch.tensor([0.0, 1.0, 3.0]).view(1, 1, 1, 3)
    up = upsample_low_res(row, (1, 6))
    assert up.flatten().tolist() == [0.0, 0.25, 0.75, 1.5, 2.5, 3.0]


def cubic(x):
    """The kernel of Keys (1981) with a = -1/2, as Pillow and antialiased interpolation use it."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def cubic_weights(old, new):
    """[i, j]: the weight of pixel j of `old` in pixel i of `new`; at the borders the rest is scaled up to 1."""
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * old / new - 0.5
    weights = cubic(centres[:, None] - torch.arange(old, dtype=torch.float64))
    return weights / weights.sum(dim=1, keepdim=True)


def test_residual_stages_upsample_by_the_cubic_kernel():
    low_res = torch.randn(2, 3, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = upsample_low_res(low_res, (6, 14), residual_scale=0.3)
    expected = cubic_weights(3, 6) @ low_res @ cubic_weights(5, 14).T
    torch.testing.assert_close(up, expected)


def test_a_residual_is_the_difference_in_units_of_the_scale():
    image, upsampled = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    residual = image_to_residual(image, upsampled, 0.25)
    assert residual.tolist() == [8.0, -8.0, 2.0]
    assert residual_to_image(residual, upsampled, 0.25).tolist() == image.tolist()


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
    rounded = level.bfloat16()
    assert torch.equal(augment_low_res(low_res, noise, rounded), augment_low_res(low_res, noise, rounded.float()))


def test_variance_is_kept():
    generator = torch.Generator().manual_seed(0)
    low_res, noise = torch.randn(2, 4, 1, 100, 100, generator=generator)
    out = augment_low_res(low_res, noise, torch.tensor([0.1, 0.4, 0.7, 0.99]))
    torch.testing.assert_close(out.var((1, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
