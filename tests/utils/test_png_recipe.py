import re

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import diffusers_pisdm
from diffusers_pisdm.utils.png_recipe import KEY, fingerprint, read_recipe, recipe_chunk


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


def test_a_fingerprint_depends_on_every_weight_of_every_model():
    def models(changed=None):
        torch.manual_seed(0)
        found = [torch.nn.Linear(40, 40), torch.nn.Linear(3, 1)]
        if changed is not None:
            weight = [p for model in found for p in model.parameters()][changed]
            weight.data += 1e-3  # as training does
        return found

    prints = [fingerprint(models(changed)) for changed in (None, 0, 1, 2, 3)]
    assert len(set(prints)) == 5 and all(re.fullmatch("[0-9a-f]{12}", text) for text in prints)
    assert fingerprint(models()) == prints[0]
    assert fingerprint(model.bfloat16() for model in models()) != prints[0]
    assert fingerprint(reversed(models())) != prints[0]
    assert fingerprint([torch.nn.Embedding(0, 4)]) == fingerprint([torch.nn.Embedding(0, 4)])
