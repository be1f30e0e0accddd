"""What programs call, with gradio_client, and what the page does without a browser."""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from benchmarks import app_load
from diffusers_pisdm.app.drawing import draw, plan_drawing
from diffusers_pisdm.app.own_picture import read_picture
from diffusers_pisdm.app.settings import read_settings
from diffusers_pisdm.utils.png_recipe import read_recipe, recipe_chunk


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def test_endpoints_are_named_and_typed(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/generate", "/classes", "/stages", "/upscale"}
    parameters = {item["parameter_name"]: item for item in endpoints["/generate"]["parameters"]}
    assert parameters["class_labels"]["type"] == {"type": "array", "items": {"type": "string"}}
    assert parameters["seed"]["type"] == {"type": "integer"}
    assert endpoints["/generate"]["returns"][0]["type"] == {"type": "array", "items": {"type": "string"}}


def test_generate_draws_what_the_pipeline_draws(client, model):
    files = client.predict(["noto/heart", "4"], images_per_class=2, seed=9, api_name="/generate")
    generators = [torch.Generator().manual_seed(9 + i) for i in range(4)]
    images = model.pipe(class_labels=[1, 1, 4, 4], generator=generators).images
    for i, (file, image) in enumerate(zip(files, images, strict=True)):
        with Image.open(file) as drawn:
            assert drawn.tobytes() == image.tobytes()
        recipe = read_recipe(file)
        assert (recipe["class_label"], recipe["seed"]) == (["noto/heart", "fxemoji/sun"][i // 2], 9 + i)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"class_labels": []}, "at least one"),
        ({"class_labels": ["noto/cat-fac"]}, "noto/cat-face"),
        ({"class_labels": ["99"]}, "0 to 4"),
        ({"class_labels": ["0"] * 9, "images_per_class": 2}, "at most 16"),
        ({"class_labels": ["0"], "seed": -1}, "seed"),
        ({"class_labels": ["0"], "num_inference_steps": [1, 101]}, "Stage 2 .*1 to 100"),
        ({"class_labels": ["0"], "num_inference_steps": [1]}, "2 stages"),
        ({"class_labels": ["0"], "guidance_scale": [11.0, 1.0]}, "Stage 1 .*1 to 10"),
    ],
)
def test_bad_input_is_a_sentence(client, arguments, words):
    with pytest.raises(Exception, match=words):
        client.predict(**arguments, api_name="/generate")


def test_upscale_keeps_the_picture(client, real_image_files):
    (file,) = client.predict(handle_file(real_image_files[0]), "noto/heart", "8 px", 3, api_name="/upscale")
    with Image.open(file) as image:
        assert image.size == (16, 16)
    assert "8x8" in read_recipe(file)["image"]


def test_a_cancelled_job_stops_the_pipeline(client, model):
    job = client.submit(["0"], images_per_class=16, num_inference_steps=[100, 100], api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    start = time.monotonic()
    client.predict(["0"], num_inference_steps=[1, 1], api_name="/generate")
    alone = time.monotonic()
    client.predict(["0"], images_per_class=16, num_inference_steps=[100, 100], api_name="/generate")
    assert alone - start < time.monotonic() - alone  # the next one did not wait for all its steps


def test_who_stops_watching_stops_only_their_own_drawing(model):
    drawing = plan_drawing(model, ["0"], 1, 0, [50, 1], [1.0, 1.0])
    left = draw(model.pipe, drawing)
    next(left)
    kept = draw(model.pipe, plan_drawing(model, ["1"], 1, 0, [2, 2], [1.0, 1.0]))
    left.close()
    steps = [(progress.stage, progress.step) for progress in kept]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_an_error_of_the_drawing_reaches_who_watches(model, monkeypatch):
    monkeypatch.setattr(model.pipe, "denoise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(draw(model.pipe, plan_drawing(model, ["0"], 1, 0, [1, 1], [1.0, 1.0])))


def test_own_pictures_are_cropped_and_shrunk(tmp_path):
    path = tmp_path / "wide.png"
    image = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    image.paste("red", (20, 0, 40, 40))
    image.save(path)
    picture = read_picture(path, [8, 16, 64])
    assert (picture.size, picture.mode) == ((16, 16), "RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((8, 8)) == (255, 0, 0)
    for size, words in ((64, "cannot be enlarged"), (48, "cannot be enlarged")):
        with pytest.raises(ValueError, match=words):
            read_picture(path, [8, 16, 64], size)
    with pytest.raises(ValueError, match="48 are needed"):
        read_picture(path, [8, 48, 64], 48)


def test_own_pictures_are_read_as_training_images_are(tmp_path):
    path = tmp_path / "own.png"
    Image.fromarray(np.full((8, 8), 20_000, np.uint16)).save(path)
    assert read_picture(path, [8, 16]).getpixel((0, 0)) == (20_000 >> 8,) * 3
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")  # starts no Ghostscript
    with pytest.raises(ValueError, match=r"no image.*PNG"):
        read_picture(path, [8, 16])


def test_what_the_page_cannot_set_is_told(model, tmp_path):
    """Whatever a recipe holds beyond the page's own settings, known to the page or not."""
    path = tmp_path / "drawn.png"
    (recipe,) = plan_drawing(model, ["0"], 1, 5, [2, 1], [2.0, 1.0]).recipes(model)
    others = {"guidance_start": 0.5, "relay_strength": [0.9], "later_option": "x"}
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(recipe | others))
    settings = read_settings(path, model)
    assert settings.drawing.seed == 5
    assert settings.unmatched == ["guidance_start=0.5", "relay_strength=[0.9]", "later_option=x"]
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(recipe))
    assert read_settings(path, model).unmatched == []


def test_zero_gpu_lends_a_gpu_to_each_drawing(monkeypatch):
    from diffusers_pisdm.app.page import _on_gpu

    def function():
        yield 1

    assert _on_gpu(function) is function
    lent = []
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lambda f: lent.append(f) or f))
    assert _on_gpu(function) is function and lent == [function]


def test_many_clients_at_once_see_no_errors(model_folder):
    result = app_load.measure(str(model_folder), num_clients=4, seconds=4, steps_per_stage=1)
    assert result["errors"] == [] and result["drawn"] >= 4
