"""Pictures with transparent pixels."""

from PIL import Image


def on_white(image: Image.Image) -> Image.Image:
    """Puts a picture with transparency on white, as RGBA; returns one without as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
