import io
import math
import struct
import zlib

import datasets
import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageFile

from diffusers_pisdm.data.image_transform import MAX_PIXELS, ImageTransform, decode_image, image_endings


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


def white_where_transparent(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


# Pillow 12.3 cannot read the YCbCr TIFF that it writes.
TIFF_YCBCR = ("YCbCr",) if int(PIL.__version__.split(".")[0]) >= 13 else ()
MODES = {
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "P", "LA", "RGB", "RGBA", "RGBX", "CMYK", *TIFF_YCBCR, "I;16", "I;16B", "PA"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "YCbCr", "I;16"),
    "GIF": ("1", "L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_every_mode_has_the_right_colours(picture, form, mode):
    alpha = Image.fromarray((np.arange(64 * 64).reshape(64, 64) % 256).astype(np.uint8))
    if mode.startswith("I;16"):
        grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        image = Image.fromarray(grey.astype(">u2") if mode == "I;16B" else grey)
        expected = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, axis=-1)
    else:
        if mode in ("LA", "RGBA"):
            image = picture.convert(mode)
            image.putalpha(alpha)
        elif mode == "PA":
            image = picture.convert("P").convert("PA")
        else:
            image = picture.convert(mode)
        expected = white_where_transparent(image)
    file = io.BytesIO()
    image.save(file, form, **({"quality": 100} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}))
    decoded = decode_image(file.getvalue())
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded) - expected).mean() < (5 if form == "JPEG" else 1)


def png(bits: int, colour_type: int, values: np.ndarray, transparent: tuple[int, ...]) -> bytes:
    """A PNG of `values`, (H, W) or (H, W, 3), with a colour that is transparent: what Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    if bits < 8:
        rows = [np.packbits([[v >> i & 1 for i in reversed(range(bits))] for v in row]).tobytes() for row in values]
    else:
        rows = [row.astype(">u2" if bits == 16 else ">u1").tobytes() for row in values]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("share", [0, 1 / 3, 1])
def test_a_transparent_grey_is_white_and_no_other(bits, share):
    most = 2**bits - 1
    values = np.linspace(0, most, 64).round().astype(int).reshape(8, 8)
    transparent = int(values.flat[round(share * 63)])
    expected = values >> 8 if bits == 16 else values * 255 // most
    expected = np.where(values == transparent, 255, expected)
    decoded = np.asarray(decode_image(png(bits, 0, values, (transparent,))))
    assert np.array_equal(decoded, np.repeat(expected[..., None], 3, axis=-1))


def test_a_transparent_colour_is_white_or_refused():
    values = np.arange(8 * 8 * 3).reshape(8, 8, 3)
    decoded = np.asarray(decode_image(png(8, 2, values, tuple(values[2, 3]))))
    values[2, 3] = 255
    assert np.array_equal(decoded, values)
    with pytest.raises(ValueError, match=r"16-bit colours .*transparent; save"):
        decode_image(png(16, 2, values * 257, (0, 0, 0)))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.float32(0.5), "floats of unknown range"),
        (np.float64(0.5), "floats of unknown range"),
        (np.int32(200), "integers of unknown range"),
        (np.int64(70_000), "integers of unknown range"),
        (np.int16(200), "integers of unknown range"),
        (np.uint32(200), "integers of unknown range"),
        (np.uint16(200 * 257), None),
        (np.uint8(200), None),
        (np.bool_(True), None),
    ],
    ids=str,
)
def test_arrays_of_a_data_set_have_a_defined_range_or_are_refused(values, problem):
    encoded = datasets.Image().encode_example(np.full((8, 8), values))["bytes"]
    if problem is None:
        assert decode_image(encoded).getpixel((3, 3)) == ((255,) * 3 if values.dtype == bool else (200,) * 3)
    else:
        with pytest.raises(ValueError, match=f"{problem}; save"):
            decode_image(encoded)


@pytest.mark.parametrize(("tag", "value"), [(258, 12), (262, 0)], ids=["12 bits", "white is zero"])
def test_other_integers_of_tiff_files_are_refused(tag, value):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(file, "TIFF")
    content = file.getvalue()
    start = content.index(struct.pack("<HHI", tag, 3, 1)) + 8
    changed = content[:start] + struct.pack("<H", value) + content[start + 2 :]
    with pytest.raises(ValueError, match="integers; save"):
        decode_image(changed)


def test_signed_integers_of_tiff_files_are_refused():
    for sample_format in (1, 2):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "TIFF", tiffinfo={339: sample_format})
        if sample_format == 1:
            assert decode_image(file.getvalue()).getpixel((0, 0)) == (0, 0, 0)
        else:
            with pytest.raises(ValueError, match=r"signed integers .*; save"):
                decode_image(file.getvalue())


def test_colours_of_unknown_white_point_are_refused(picture):
    file = io.BytesIO()
    Image.merge("LAB", picture.split()).save(file, "TIFF")
    with pytest.raises(ValueError, match=r"CIELAB colours .*; save"):
        decode_image(file.getvalue())


@pytest.mark.parametrize("form", ["EPS", "ICO", "ICNS", "SPIDER", "MSP", "IM"])
def test_other_formats_are_not_opened(picture, form, monkeypatch):
    """An EPS file would start Ghostscript, whatever its name."""
    file = io.BytesIO()
    image = {"MSP": picture.convert("1"), "SPIDER": picture.convert("F"), "ICNS": picture.resize((16, 16))}
    image.get(form, picture).save(file, form)
    Image.init()
    monkeypatch.setitem(Image.OPEN, form, (lambda *_: pytest.fail(f"{form} was opened"), Image.OPEN[form][1]))
    with pytest.raises(ValueError, match=r"no image, .*PNG"):
        decode_image(file.getvalue())


def test_endings_are_those_of_the_formats_that_are_read():
    endings = image_endings()
    assert {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm", ".tga"} <= endings
    assert not {".eps", ".ps", ".pdf", ".fits", ".h5", ".wmf", ".mpg", ".txt"} & endings


def test_pixels_are_bounded_before_any_is_decoded(monkeypatch):
    content = png(1, 0, np.zeros((1, 1), int), (0,))
    side = math.isqrt(MAX_PIXELS)

    def load(_):
        raise RuntimeError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for width, height, fits in ((side, side, True), (side, side + 1, False), (2 * side, side // 2 + 1, False)):
        header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        large = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        with pytest.raises(
            RuntimeError if fits else ValueError, match="decoded" if fits else f"{width}x{height}.*scale"
        ):
            decode_image(large)
