"""What programs call, with gradio_client, and what the page does without a browser."""

import socket
import sys
import time
from types import SimpleNamespace

import gradio
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

from benchmarks import app_load
from diffusers_pisdm.app import page
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
    names = [item["parameter_name"] for item in endpoints["/upscale"]["parameters"]]
    assert names == ["image", "class_label", "size", "seed"]
    returned = {name: endpoint["returns"][0]["python_type"]["type"] for name, endpoint in endpoints.items()}
    assert returned == dict.fromkeys(("/generate", "/classes", "/upscale"), "list[str]") | {"/stages": "list[int]"}


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
        (
            {"class_labels": ["noto/cat-fac", "zzz", "0"]},
            "'noto/cat-face'.*'zzz'.*class box .*`/classes`.* lists them",
        ),
        ({"class_labels": ["99"]}, "0 to 4"),
        ({"class_labels": ["0"] * 9, "images_per_class": 2}, "at most 16"),
        ({"class_labels": ["0"], "seed": -1}, "seed"),
        ({"class_labels": ["0"], "num_inference_steps": [1, 101]}, "steps` of stage 2 is 101.*1 to 100.*generate"),
        ({"class_labels": ["0"], "num_inference_steps": [1, 0]}, "steps` of stage 2 .*positive integer.* 0"),
        ({"class_labels": ["0"], "num_inference_steps": [1]}, "1 value.*2 stages"),
        ({"class_labels": ["0"], "num_inference_steps": "abc"}, "steps` of stage 1 .*positive integer.*'abc'"),
        ({"class_labels": ["0"], "guidance_scale": [11.0, 1.0]}, "scale` of stage 1 is 11.*1 to 10.*generate"),
        ({"class_labels": ["0"], "guidance_scale": 10**400}, "scale` of stage 1 .*1 to 10"),
        ({"class_labels": "noto/heart"}, "list of class names.*'noto/heart'.*Pass"),
        ({"class_labels": [["0", "1"]]}, r"\['0', '1'\]"),
        ({"class_labels": ["0"], "seed": 2**60}, "seed .*generate"),
        ({"class_labels": ["0"], "seed": 2**63}, "seed [^`]*$"),
        ({"class_labels": ["0"], "seed": "abc"}, "seed .*whole.*'abc'"),
        ({"class_labels": ["0"], "images_per_class": None}, "per class .*whole.*empty"),
    ],
)
def test_bad_input_is_a_sentence(client, arguments, words):
    with pytest.raises(Exception, match=words):
        client.predict(**arguments, api_name="/generate")


def test_upscale_keeps_the_picture(client, real_image_files):
    (file,) = client.predict(handle_file(real_image_files[0]), "noto/heart", 8, 3, api_name="/upscale")
    with Image.open(file) as image:
        assert image.size == (16, 16)
    assert "8x8" in read_recipe(file)["image"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"class_label": "heart"}, "'heart'.*Did you mean 'noto/heart'"),
        ({"class_label": None}, "None"),
        ({"size": 16}, "has to be 8 pixels but is 16"),
        ({"size": "8 px"}, "8 pixels but is '8 px'"),
        ({"seed": "abc"}, "seed .*whole.*'abc'"),
        ({"image": None}, "no picture"),
        ({"image": "text.png"}, "not a picture .*PNG"),
        ({"image": b"icon.png"}, r"a file, not 'icon\.png'.*`handle_file"),
        ({"image": b"https://example.org/icon.png"}, r"a file, not 'https.*`handle_file"),
    ],
)
def test_upscale_refuses_in_a_sentence(client, real_image_files, tmp_path, arguments, words):
    (tmp_path / "text.png").write_text("text")
    arguments = {"image": str(real_image_files[0]), "class_label": "noto/heart"} | arguments
    if isinstance(arguments["image"], bytes):
        arguments["image"] = arguments["image"].decode()  # without handle_file
    elif arguments["image"] is not None:
        arguments["image"] = handle_file(tmp_path / arguments["image"])
    with pytest.raises(Exception, match=words):
        client.predict(**arguments, api_name="/upscale")


def test_classes_are_found_by_a_word(client):
    assert client.predict("HEART", api_name="/classes") == ["noto/heart", "twemoji/heart"]
    for wrong in (None, 5):
        with pytest.raises(Exception, match=f"`contains` .*text but is {wrong}"):
            client.predict(wrong, api_name="/classes")


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
    for size in (64, 48):
        with pytest.raises(ValueError, match=f"8 or 16 pixels but is {size}"):
            read_picture(path, [8, 16, 64], size)
    with pytest.raises(ValueError, match="60x40 pixels, but at least 48x48"):
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
    assert recipe["dtype"] == "float32"
    others = {"dtype": "bfloat16", "guidance_start": 0.5, "relay_strength": [0.9], "later_option": "x"}
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(recipe | others))
    settings = read_settings(path, model)
    assert settings.drawing.seed == 5
    assert settings.unmatched == ["dtype=bfloat16", "guidance_start=0.5", "relay_strength=[0.9]", "later_option=x"]
    assert f"--recipe {path.name}" in settings.remedy
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(recipe | {"image": "a picture of 8x8 pixels"}))
    assert read_settings(path, model).remedy == ""  # the recipe does not hold it
    Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(recipe))
    assert read_settings(path, model).unmatched == []
    retrained = recipe | {"weights": "0123456789ab"}
    for others, unmatched in ({}, ["weights=0123456789ab"]), ({"dtype": "bfloat16"}, ["dtype=bfloat16"]):
        Image.new("RGB", (8, 8)).save(path, pnginfo=recipe_chunk(retrained | others))
        settings = read_settings(path, model)
        assert settings.unmatched == unmatched and (settings.remedy == "") == (others == {})


def test_zero_gpu_lends_a_gpu_to_each_drawing(monkeypatch):
    from diffusers_pisdm.app.page import _on_gpu

    def function():
        yield 1

    assert _on_gpu(function) is function
    lent = []
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lambda f: lent.append(f) or f))
    assert _on_gpu(function) is function and lent == [function]


@pytest.mark.parametrize(
    "options, space, takes_models",
    [
        ({}, "", True),
        ({"share": True}, "", False),
        ({"host": "0.0.0.0"}, "", False),
        ({}, "someone/pisdm", False),
    ],
)
def test_only_the_machines_own_user_loads_other_models(
    model_folder, monkeypatch, capsys, options, space, takes_models
):
    built = []
    monkeypatch.setenv("SPACE_ID", space)
    here = "http://here:1/"
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **_: built.append(app) or (None, here, None))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: None)
    page.launch(str(model_folder), **options)
    assert here in capsys.readouterr().out
    config = built[0].get_config_file()
    assert any(part["props"].get("elem_id") == "model" for part in config["components"]) == takes_models
    assert any(function.name == "load" for function in built[0].fns.values()) == takes_models


def test_an_adapter_in_place_of_a_model_is_told(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a LoRA adapter: .*--lora"):
        page.launch(str(tmp_path))


def test_a_taken_port_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match=r"port \d+ .*in use.*--port"):
        page.launch("no/such/model", port=taken.getsockname()[1])


@pytest.mark.slow
def test_many_clients_at_once_see_no_errors(model_folder):
    result = app_load.measure(str(model_folder), num_clients=4, seconds=4, steps_per_stage=1)
    assert result["errors"] == [] and result["drawn"] >= 4
