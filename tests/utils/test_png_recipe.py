import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffusers_pisdm
from diffusers_pisdm.utils.png_recipe import KEY, read_recipe, recipe_chunk


RECIPE = {"model": "modèle 猫", "class_label": "noto/Geräte", "seed": 2**53, "guidance_scale": [2.5, 1.0]}


def test_a_png_carries_its_recipe_and_the_versions(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=recipe_chunk(RECIPE))
    recipe = read_recipe(path)
    assert recipe.pop("versions")["diffusers_pisdm"] == diffusers_pisdm.__version__
    assert recipe == RECIPE


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000, f'{{"a": "{"x" * 200_000}"}}'])
def test_a_damaged_recipe_is_refused(tmp_path, text):
    chunk = PngInfo()
    chunk.add_itxt(KEY, text)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=chunk)
    with pytest.raises(ValueError, match=r"a\.png.*damaged"):
        read_recipe(tmp_path / "a.png")


def test_a_picture_without_a_recipe_is_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no recipe"):
        read_recipe(tmp_path / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"junk" * 9)
    for name in ("b.jpg", "c.png"):
        with pytest.raises(ValueError, match=f"{name} is not a PNG"):
            read_recipe(tmp_path / name)
