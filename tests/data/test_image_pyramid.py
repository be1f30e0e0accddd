import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_pisdm.training import image_pyramid


def test_each_level_is_the_mean_of_the_pixels_it_covers():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    small, middle, full = image_pyramid(images, [4, 8, 16])
    torch.testing.assert_close(small, images.unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean(dim=(3, 5)))
    torch.testing.assert_close(middle, images.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean(dim=(3, 5)))
    assert full is images


def test_agrees_with_pillow_on_a_real_image(real_image_files):
    with Image.open(real_image_files[0]) as image:
        image = image.convert("RGB")
    expected = np.asarray(image.resize((16, 16), Image.BOX), dtype=np.float32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    actual = image_pyramid(pixels, [16])[0][0].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).max() <= 1.01  # Pillow rounds to whole levels, along each axis


def test_sizes_that_do_not_divide_are_antialiased_too():
    stripes = torch.ones(1, 1, 64, 64)
    stripes[..., ::2] = -1
    assert image_pyramid(stripes, [24])[0].abs().max() < 0.5


def test_images_smaller_than_a_stage_are_refused():
    with pytest.raises(ValueError, match=r"32x32 pixels, smaller than the largest stage \(64\)"):
        image_pyramid(torch.zeros(1, 3, 32, 32), [16, 64])
