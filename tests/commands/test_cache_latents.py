import json

import pytest
import torch

from diffusers_pisdm.commands import cache_latents
from diffusers_pisdm.data.latent_cache import LatentCache
from tests.data.image_folders import copy_folder, write_parquet
from tests.models.tiny_vae import make_kl, make_tiny


STAGE = {"patch_size": 2, "in_channels": 4, "num_layers": 2, "hidden_size": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def images(real_image_files, tmp_path):
    return copy_folder(real_image_files[::4], tmp_path / "images")


@pytest.fixture
def run(tmp_path, images):
    torch.manual_seed(0)
    make_kl(scaling_factor=0.5).save_pretrained(tmp_path / "vae")

    def run(*more, channels=4, vae=tmp_path / "vae", data=images):
        stages = [{**STAGE, "in_channels": channels, "sample_size": size} for size in (4, 8)]
        recipe = {"scheduler": {}, "stages": stages, **({} if vae is None else {"vae": str(vae)})}
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        cache_latents.main(
            [
                *("--cascade_config", str(tmp_path / "recipe.json"), "--train_data_dir", str(data)),
                *("--output_dir", str(tmp_path / "latents"), "--images_per_shard", "5", "--batch_size", "4", *more),
            ]
        )
        return tmp_path / "latents"

    return run


def test_a_folder_of_images_becomes_a_cache_that_training_reads(run, images, capsys):
    folder = run("--random_flip")
    assert "12 images of 8 classes in" in capsys.readouterr().out
    cache = LatentCache(folder, random_flip=True)
    cache.check_stages([4, 8], 4)
    assert cache.class_names == sorted(path.name for path in images.iterdir())
    index = json.loads((folder / "index.json").read_text())
    assert (index["image_size"], index["dtype"], index["vae_class"]) == (32, "float16", "AutoencoderKL")
    assert len(cache) == 12 and cache.read(11, 0, 0).label == 7

    files = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "shard-00001.safetensors").unlink()
    run("--random_flip")
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_a_cache_that_was_begun_keeps_its_class_ids(run, real_image_files, tmp_path):
    """One of an earlier version, which sorted numbers as text."""
    for file, name in zip(real_image_files, ("10", "9", "2")):
        (tmp_path / "numbers" / name).mkdir(parents=True)
        (tmp_path / "numbers" / name / file.name).write_bytes(file.read_bytes())
    index_file = run(data=tmp_path / "numbers") / "index.json"
    index = json.loads(index_file.read_text())
    assert index["class_names"] == ["2", "9", "10"]
    (index_file.parent / "shard-00000.safetensors").unlink()
    index_file.write_text(json.dumps({**index, "class_names": ["10", "2", "9"]}))
    cache = LatentCache(run(data=tmp_path / "numbers"))
    assert cache.class_names == ["10", "2", "9"]
    assert [cache.read(row, 0, 0).label for row in range(3)] == [0, 1, 2]  # in the order of their paths


def test_class_names_and_another_autoencoder_can_be_given(run, real_image_files, tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"{letter}\n" for letter in "abc"))
    make_tiny().save_pretrained(tmp_path / "taesd")
    folder = run(
        *("--pretrained_vae_model_name_or_path", str(tmp_path / "taesd"), "--class_names_file"),
        *(str(tmp_path / "names.txt"), "--image_column", "picture", "--label_column", "kind"),
        data=write_parquet(real_image_files[:3], tmp_path / "parquet", [2, 0, 1]),
    )
    cache = LatentCache(folder)
    assert cache.class_names == ["a", "b", "c"] and not cache.index.has_std
    assert [cache.read(row, 0, 0).label for row in range(3)] == [2, 0, 1]


def test_errors_say_what_to_do(run, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* 3 channels \(`in_channels`\), .* latents of .* have 4"):
        run(channels=3)
    with pytest.raises(SystemExit, match=r"no `vae`: .*--pretrained_vae_model_name_or_path"):
        run(vae=None)
    with pytest.raises(SystemExit, match="There is no folder"):
        run(data=tmp_path / "nowhere")
    run()
    with pytest.raises(SystemExit, match=r"other settings: dtype was float16, is float32.*--output_dir"):
        run("--latent_dtype", "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --dataset_name or --train_data_dir"),
        (["--train_data_dir", "a", "--batch_size", "0"], "--batch_size: must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cache_latents.parse_args(["--cascade_config", "c.json", "--output_dir", "o", *arguments])
    assert message in capsys.readouterr().err
