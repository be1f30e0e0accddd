"""What pixels mean: which of Pillow's modes have a defined range, and how they become 8-bit colours."""

import numpy as np
from PIL import Image


# Pillow's modes whose values have a defined range, and which become the right colours; what the others are.
MODES = (
    *("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBA", "RGBa"),
    *("I;16", "I;16B", "I;16L", "I;16N"),
)
UNDEFINED_MODES = {
    "F": "floats of unknown range",
    "I": "32-bit integers of unknown range",
    "LAB": "CIELAB colours of unknown white point",
}


def mode_problem(image: Image.Image) -> str | None:
    """What a picture's pixels are, if Pillow would not turn their mode into the right colours."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits
        return None
    return UNDEFINED_MODES.get(image.mode) or (None if image.mode in MODES else f"of mode {image.mode}")


def to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey keeps its upper 8 bits, a transparent value becoming white; other pictures return as they are."""
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    grey = (pixels >> 8).astype(np.uint8)  # Pillow would clip 16 bits at 255
    grey[pixels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey)


def on_white(image: Image.Image) -> Image.Image:
    """Puts a picture with transparency on white, as RGBA; returns one without as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
