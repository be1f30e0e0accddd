import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_pisdm.data.image_transform import ImageTransform, decode_image


def encode(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def picture(real_image_files) -> Image.Image:
    with Image.open(real_image_files[0]) as image:
        return image.convert("RGB")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_pixels_of_the_right_size_are_kept(picture):
    pixels = ImageTransform(64)(picture, generator())
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(picture))


def test_whole_factors_average_areas(picture):
    pixels = ImageTransform(16)(picture, generator()).float()
    means = torch.from_numpy(np.array(picture)).float().view(16, 4, 16, 4, 3).mean(dim=(1, 3)).permute(2, 0, 1)
    assert (pixels - means).abs().max() <= 0.5


@pytest.mark.parametrize("size", [(64, 40), (40, 64)], ids=str)
def test_the_centre_of_a_rectangle_is_kept(picture, size):
    left, top = (64 - size[0]) // 2, (64 - size[1]) // 2
    rectangle = picture.crop((left, top, left + size[0], top + size[1]))
    expected = picture.crop((12, 12, 52, 52))
    pixels = ImageTransform(40)(rectangle, generator())
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_small_images_are_enlarged(picture):
    pixels = ImageTransform(96)(picture.resize((40, 30)), generator())
    assert pixels.shape == (3, 96, 96)


def test_flips_mirror_half_of_the_images(picture):
    transform = ImageTransform(64, random_flip=True)
    plain = ImageTransform(64)(picture, generator())
    flipped = [not torch.equal(transform(picture, generator(seed)), plain) for seed in range(40)]
    assert 10 < sum(flipped) < 30
    seed = flipped.index(True)
    assert torch.equal(transform(picture, generator(seed)), plain.flip(-1))


def test_random_crops_differ_in_place_and_scale(picture):
    transform = ImageTransform(32, random_crop=True)
    crops = [transform(picture, generator(seed)) for seed in range(8)]
    assert all(crop.shape == (3, 32, 32) for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) > 4
    assert torch.equal(transform(picture, generator(3)), crops[3])


def test_transparency_is_white(picture):
    transparent = picture.convert("RGBA")
    transparent.putalpha(0)
    assert decode_image(encode(transparent)).getcolors() == [(64 * 64, (255, 255, 255))]


def test_images_are_turned_as_their_exif_data_says(picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = decode_image(encode(picture, exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(picture), -1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(picture, mode):
    if mode == "I;16":
        grey = np.asarray(picture.convert("L"))
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        expected = np.repeat(grey[..., None], 3, axis=-1)
    else:
        image = picture.convert(mode)
        expected = np.asarray(image.convert("RGB"))
    decoded = decode_image(encode(image))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)


def test_floats_have_no_range(picture):
    file = io.BytesIO()
    picture.convert("F").save(file, "TIFF")
    with pytest.raises(ValueError, match="floats of unknown range"):
        decode_image(file.getvalue())
